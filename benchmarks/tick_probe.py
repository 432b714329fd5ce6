"""Loaded into SGLang beside Mainstem's plug-in by `benchmarks.scheduler_tick`: times each tick's disaggregation part.

Two clocks, both of the scheduler's thread: `ours` is spent in the methods of
engine/sglang_handoff.py, `whole` in everything that SGLang's scheduler does for the
hand-offs in a tick, ours included. A record for each tick goes to a file of the process's own.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from typing import Any, BinaryIO

RECORD = struct.Struct("<dIIII")
"""Seconds of the steady clock, hand-offs in flight, ns in the whole path, ns in our methods, and how many ns of the
whole path the thread was ready to run and had no core: other processes' doing."""
FILE_VARIABLE = "MAINSTEM_TICK_FILE"
FLUSH_S = 0.5

OURS = {
    "MainstemKVReceiver": ("__init__", "init", "send_metadata", "poll", "clear", "abort"),
    "MainstemKVSender": ("__init__", "init", "pop_decode_prefix_len", "send", "poll", "clear", "abort"),
}
WHOLE = {
    "sglang.srt.disaggregation.prefill.PrefillBootstrapQueue.pop_bootstrapped": "bootstrapped",
    "sglang.srt.managers.scheduler.Scheduler.send_kv_chunk": "part",
    "sglang.srt.managers.scheduler.Scheduler.process_disagg_prefill_inflight_queue": "prefill_tick",
    "sglang.srt.managers.scheduler.Scheduler.process_decode_queue": "decode_tick",
}


def register() -> None:
    """Entry point of the group `sglang.srt.plugins`."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    probe = Probe(os.environ[FILE_VARIABLE])
    for owner, methods in OURS.items():
        for method in methods:
            HookRegistry.register(f"engine.sglang_handoff.{owner}.{method}", probe.ours, HookType.AROUND)
    for path, name in WHOLE.items():
        HookRegistry.register(path, getattr(probe, name), HookType.AROUND)


class Probe:
    """The clocks of one process. Its hooks run on the scheduler's thread only."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._ours_ns = 0
        self._whole_ns = 0
        self._no_core_ns = 0
        self._schedstat = -1
        self._flushed_s = 0.0

    def ours(self, original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        began_ns = time.perf_counter_ns()
        try:
            return original(*arguments, **named)
        finally:
            self._ours_ns += time.perf_counter_ns() - began_ns

    def part(self, original: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        no_core_ns = self._without_core_ns()
        began_ns = time.perf_counter_ns()
        try:
            return original(*arguments, **named)
        finally:
            self._whole_ns += time.perf_counter_ns() - began_ns
            self._no_core_ns += self._without_core_ns() - no_core_ns

    bootstrapped = part

    def prefill_tick(self, original: Callable[..., Any], scheduler: Any, *arguments: Any, **named: Any) -> Any:
        answer = self.part(original, scheduler, *arguments, **named)
        in_flight = len(scheduler.disagg_prefill_inflight_queue) + len(scheduler.disagg_prefill_bootstrap_queue.queue)
        self._end_tick(in_flight)
        return answer

    def decode_tick(self, original: Callable[..., Any], scheduler: Any) -> Any:
        answer = self.part(original, scheduler)
        in_flight = len(scheduler.disagg_decode_prealloc_queue.queue) + len(
            scheduler.disagg_decode_transfer_queue.queue
        )
        self._end_tick(in_flight)
        return answer

    def _end_tick(self, in_flight: int) -> None:
        now_s = time.monotonic()
        if self._file is None:
            self._file = open(f"{self._path}.{os.getpid()}", "ab")  # noqa: SIM115  # for as long as the process lives
        self._file.write(RECORD.pack(now_s, in_flight, self._whole_ns, self._ours_ns, self._no_core_ns))
        self._ours_ns = self._whole_ns = self._no_core_ns = 0
        if now_s - self._flushed_s > FLUSH_S:
            self._flushed_s = now_s
            self._file.flush()

    def _without_core_ns(self) -> int:
        """For how long this thread has waited for a core, ready to run, in its whole life (Linux: schedstat)."""
        if self._schedstat < 0:
            self._schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        return int(os.pread(self._schedstat, 100, 0).split()[1])
