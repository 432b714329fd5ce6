"""What is done to a cluster, and how it is undone."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import psutil

from benchmarks.bench_cluster import scheduler_of
from benchmarks.chaos.injections import Injection, Kind
from benchmarks.chaos.relay import Relay
from benchmarks.reference import prompt_of
from engine.launch.cluster import Cluster

STOPPED_S = 6.5
"""Longer than a lease."""
HUNG_S = 12.0
"""Longer than `hung_s` of the cluster, and a renewal."""
HELD_S = 6.0
SLOW_BYTES_PER_S = 200_000
FLOOD_REQUESTS = 8
FLOOD_PROMPT_TOKENS = 700
FLOOD_TOKENS = 200


@dataclass(frozen=True)
class Ports:
    """The relays in front of one worker."""

    http: Relay
    handoff: Relay


class Faults:
    """relays  by worker"""

    def __init__(self, cluster: Cluster, relays: dict[str, Ports], model: str) -> None:
        self._cluster = cluster
        self._relays = relays
        self._model = model

    @contextlib.contextmanager
    def injected(self, one: Injection, victim: str) -> Iterator[None]:
        """The fault is there from here to the end, and then it is over, or mends itself."""
        with contextlib.ExitStack() as undo:
            self._inject(one, victim, undo)
            yield

    def _inject(self, one: Injection, victim: str, undo: contextlib.ExitStack) -> None:
        match one.kind:
            case Kind.KILL_SCHEDULER:
                _signal([scheduler_of(self._cluster, victim)], signal.SIGKILL)
            case Kind.KILL_AGENT:
                _signal([psutil.Process(self._cluster.workers[victim])], signal.SIGKILL)
            case Kind.KILL_ROUTER:
                routers = [view for view in self._cluster.view.processes if view.role == "router"]
                pid = routers[one.variant % len(routers)].pid
                if pid is not None:
                    os.kill(pid, signal.SIGKILL)
            case Kind.STOP:
                processes = [scheduler_of(self._cluster, victim)]
                if not one.variant:
                    leader = psutil.Process(self._cluster.workers[victim])
                    processes = [leader, *leader.children(recursive=True)]
                _signal(processes, signal.SIGSTOP)
                undo.callback(_signal, processes, signal.SIGCONT)
                undo.callback(time.sleep, HUNG_S if one.variant else STOPPED_S)
            case Kind.RESET:
                self._relays[victim].http.reset()
                self._relays[victim].handoff.reset()
            case Kind.BLACKHOLE:
                self._for_a_while(self._chosen(one, victim), Relay.hold, undo)
            case Kind.SLOW:
                links = [self._relays[name].handoff for name in self._prefills(one, victim)]
                self._for_a_while(links, lambda relay: relay.slow(SLOW_BYTES_PER_S), undo)
            case Kind.FULL_POOL:
                flood = [Flood(self._cluster.url, self._model, number) for number in range(FLOOD_REQUESTS)]
                for request in flood:
                    undo.callback(request.hang_up)
                undo.callback(time.sleep, HELD_S)

    def _prefills(self, one: Injection, victim: str) -> list[str]:
        """Whose hand-off port it is: the victim's, or those of all that a decode worker gets its pages from."""
        return [victim] if one.role == "prefill" else [name for name in self._relays if name.startswith("prefill")]

    def _chosen(self, one: Injection, victim: str) -> list[Relay]:
        if one.variant:
            return [self._relays[name].handoff for name in self._prefills(one, victim)]
        return [self._relays[victim].http]

    @staticmethod
    def _for_a_while(relays: list[Relay], act: Callable[[Relay], None], undo: contextlib.ExitStack) -> None:
        for relay in relays:
            act(relay)
            undo.callback(relay.heal)
        undo.callback(time.sleep, HELD_S)


class Flood:
    """A long request that nobody wants to be answered: it takes room."""

    def __init__(self, url: str, model: str, number: int) -> None:
        target = urlsplit(url)
        body = {
            "model": model,
            "prompt": prompt_of(FLOOD_PROMPT_TOKENS, seed=900_000 + number),
            "max_tokens": FLOOD_TOKENS,
            "ignore_eos": True,
            "stream": True,
        }
        self._connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
        self._connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def hang_up(self) -> None:
        sock = self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(2)
        self._reader.join(5)
        self._connection.close()

    def _read(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError, AttributeError):
            self._connection.getresponse().read()


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
