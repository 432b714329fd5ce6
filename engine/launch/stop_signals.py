"""Ctrl-C, SIGTERM and SIGHUP mean: stop the cluster. A second one means: at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self

from engine.launch.cluster import Cluster

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Catches the signals from `with` on, so that none is lost while a cluster is being made."""

    def __init__(self) -> None:
        self._count = 0
        self._cluster: Cluster | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._caught) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop(self, cluster: Cluster) -> None:
        """From now on this cluster is stopped; at once, where a signal has come already."""
        self._cluster = cluster
        self._pass_on()

    def _caught(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        self._pass_on()

    def _pass_on(self) -> None:
        if self._cluster is not None and self._count:
            if self._count == 1:
                self._cluster.ask_stop()
            else:
                self._cluster.kill()
