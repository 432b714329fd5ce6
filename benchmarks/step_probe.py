"""Loaded into SGLang beside Mainstem's plug-in by `benchmarks.decode_itl`: what decode's steps take, and where.

A step is over when its tokens have left the scheduler. A record for each goes to a file of the process's own: when
that was, and for how long the scheduler's thread was in each of its parts since the step before.
"""

from __future__ import annotations

import os
import struct
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

PARTS = {
    "intake": "process_input_requests",
    "hand-offs": "process_decode_queue",
    "batch of them": "get_new_prebuilt_batch",
    "plan": "get_next_disagg_decode_batch_to_run",
    "launch": "run_batch",
    "result": "process_batch_result",
}
"""Methods of SGLang's scheduler. `batch of them` is within `plan`; `result` is also where it waits for the GPU."""
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler."
RECORD = struct.Struct(f"<dI{len(PARTS)}I")
"""Seconds of `time.perf_counter`, requests in the step, and microseconds in each part."""
FILE_VARIABLE = "MAINSTEM_STEP_FILE"
FLUSH_S = 0.2


def register() -> None:
    """Entry point of the group `sglang.srt.plugins`."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    probe = Probe(os.environ[FILE_VARIABLE])
    for part, method in PARTS.items():
        HookRegistry.register(SCHEDULER + method, probe.clock(part), HookType.AROUND)


class Probe:
    """The clocks of one process. Its hooks run on the scheduler's thread only."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._untold = bytearray()
        self._taken_ns: dict[str, int] = defaultdict(int)
        self._flushed_s = 0.0

    def clock(self, part: str) -> Callable[..., Any]:
        def timed(original: Callable[..., Any], scheduler: Any, *arguments: Any, **named: Any) -> Any:
            began_ns = time.perf_counter_ns()
            answer = original(scheduler, *arguments, **named)
            self._taken_ns[part] += time.perf_counter_ns() - began_ns
            if part == "result" and scheduler.disagg_decode_prealloc_queue is not None:
                self._ended(len(arguments[0].reqs))
            return answer

        return timed

    def _ended(self, requests: int) -> None:
        now_s = time.perf_counter()
        self._untold += RECORD.pack(now_s, requests, *(self._taken_ns[part] // 1000 for part in PARTS))
        self._taken_ns.clear()
        if now_s - self._flushed_s > FLUSH_S:
            self._flushed_s = now_s
            with Path(f"{self._path}.{os.getpid()}").open("ab") as file:
                file.write(self._untold)
            self._untold.clear()


Step = dict[str, float]
"""Of one step: `requests`, `gap_ms` since the step before, and milliseconds by part."""


def steps(files: Sequence[Path], from_s: float, until_s: float, least_requests: int) -> list[Step]:
    """Those of a span in which so many requests or more ran."""
    found = []
    for file in files:
        before_s = None
        for at_s, requests, *taken_us in _records(file):
            if before_s is not None and from_s <= before_s and at_s <= until_s and requests >= least_requests:
                parts = {part: taken / 1e3 for part, taken in zip(PARTS, taken_us, strict=True)}
                found.append({"requests": requests, "gap_ms": 1e3 * (at_s - before_s), **parts})
            before_s = at_s
    return found


def _records(file: Path) -> Iterator[tuple[Any, ...]]:
    data = file.read_bytes()
    yield from RECORD.iter_unpack(data[: len(data) // RECORD.size * RECORD.size])
