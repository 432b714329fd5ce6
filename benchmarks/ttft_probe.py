"""Loaded into SGLang beside Mainstem's plug-in by `benchmarks.added_ttft`: when a request was where, in each worker.

SGLang notes most of these times itself, by `time.perf_counter`, which all processes of a host share. Here they are
written down when a request is over, a line of JSON each in a file of the process's own; and of each prefill pass how
long the CPU took to launch it, how much of that it computed, and how long the GPU took.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE_VARIABLE = "MAINSTEM_TTFT_FILE"
FLAG = "enable-request-time-stats-logging"
"""With which SGLang calls what is hooked here."""
HTTP, SCHEDULER, PASS = "http", "scheduler", "pass"
"""Who tells: a worker's HTTP process, its scheduler, or that of a pass."""
UNIFIED, PREFILL, DECODE = "unified", "prefill", "decode"
"""Roles, as SGLang calls them; a unified worker does both."""


def register() -> None:
    """Entry point of the group `sglang.srt.plugins`."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    probe = Probe(os.environ[FILE_VARIABLE])
    stats = "sglang.srt.observability.req_time_stats.APIServerReqTimeStats."
    HookRegistry.register(stats + "set_finished_time", probe.answered, HookType.AFTER)
    HookRegistry.register("sglang.srt.managers.schedule_batch.Req.log_time_stats", probe.over, HookType.BEFORE)
    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.run_batch", probe.run_batch, HookType.AROUND)


@dataclass
class _Pass:
    role: str
    told: dict[str, float]
    began: Any
    """An event of the GPU's, as `ended`; None where there is no GPU."""
    ended: Any


class Probe:
    """One process's. Each hook runs on one thread only."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._passes: list[_Pass] = []

    def answered(self, _nothing: Any, stats: Any, *_arguments: Any, **_named: Any) -> None:
        self._tell(HTTP, stats.disagg_mode_str(), _times(stats))

    def over(self, request: Any) -> None:
        computing = []
        for one in self._passes:
            if one.ended is not None:
                if not one.ended.query():
                    # Later: to wait for it would keep the scheduler from what it does beside a pass.
                    computing.append(one)
                    continue
                one.told["gpu_ms"] = one.began.elapsed_time(one.ended)
            self._tell(PASS, one.role, one.told)
        self._passes = computing
        self._tell(SCHEDULER, request.time_stats.disagg_mode_str(), _times(request.time_stats))

    def run_batch(self, original: Any, scheduler: Any, batch: Any, *arguments: Any, **named: Any) -> Any:
        if not batch.forward_mode.is_extend():
            return original(scheduler, batch, *arguments, **named)
        record = _recorder(scheduler)
        began_s, cpu_s, before = time.perf_counter(), time.thread_time(), resource.getrusage(resource.RUSAGE_THREAD)
        began = record()
        result = original(scheduler, batch, *arguments, **named)
        ended = record()
        ended_s, ended_cpu_s = time.perf_counter(), time.thread_time()
        after = resource.getrusage(resource.RUSAGE_THREAD)
        told = {
            "began_time": began_s,
            "launch_ms": 1e3 * (ended_s - began_s),
            "launch_cpu_ms": 1e3 * (ended_cpu_s - cpu_s),
            "waits": float(after.ru_nvcsw - before.ru_nvcsw),
            "pushed_out": float(after.ru_nivcsw - before.ru_nivcsw),
        }
        self._passes.append(_Pass(batch.reqs[0].time_stats.disagg_mode_str(), told, began, ended))
        return result

    def _tell(self, who: str, role: str, told: dict[str, float]) -> None:
        line = json.dumps({"who": who, "role": role, **told})
        with Path(f"{self._path}.{os.getpid()}").open("a") as file:
            file.write(line + "\n")


def _recorder(scheduler: Any) -> Callable[[], Any]:
    """What puts an event into the stream in which a pass is computed, and returns it; None where there is no GPU."""
    import torch

    if torch.device(scheduler.device).type != "cuda":
        return lambda: None
    from engine.sglang_layers import stream_of

    def record() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream_of(scheduler))
        return event

    return record


def _times(stats: Any) -> dict[str, float]:
    """Those that were set."""
    return {name: value for name, value in vars(stats).items() if name.endswith("_time") and value}


@dataclass(frozen=True)
class Asked:
    """One request, as its client saw it, in seconds of `time.perf_counter`."""

    sent_s: float
    first_s: float
    """When its first token came."""


@dataclass(frozen=True)
class Point:
    """A place in a worker that a request comes by."""

    label: str
    roles: tuple[str, ...]
    who: str
    field: str


COMPUTING = (UNIFIED, PREFILL)
POINTS = (
    Point("HTTP has read it", COMPUTING, HTTP, "created_time"),
    Point("scheduler has it", COMPUTING, SCHEDULER, "scheduler_recv_time"),
    Point("pass begins", COMPUTING, SCHEDULER, "forward_entry_time"),
    Point("pass seen over", COMPUTING, SCHEDULER, "prefill_finished_time"),
    Point("decode's HTTP has read it", (DECODE,), HTTP, "created_time"),
    Point("decode's scheduler has it", (DECODE,), SCHEDULER, "scheduler_recv_time"),
    Point("decode has found pages", (DECODE,), SCHEDULER, "decode_transfer_queue_entry_time"),
    Point("decode has the pages", (DECODE,), SCHEDULER, "forward_entry_time"),
    Point("prefill's HTTP has a token", (PREFILL,), HTTP, "first_token_time"),
    Point("HTTP has a token", (UNIFIED, DECODE), HTTP, "first_token_time"),
)
LAUNCHED, COMPUTED = "pass launched", "GPU is through"
CLIENT = "client has a token"
BESIDE = "of that, beside the pass"
"""A short prompt's pass takes as long as the CPU takes to launch it, and that is twice as long at one time as at
another, in any worker: what disaggregation adds shows beside it."""
LENGTHS = ("gpu_ms", "launch_ms", "launch_cpu_ms", "waits", "pushed_out")
"""Of all passes of a request together."""
Record = dict[str, Any]


def read(files: Iterable[Path]) -> list[Record]:
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def timeline(records: Sequence[Record], asked: Sequence[Asked], *, together: bool = False) -> dict[str, float]:
    """Medians over these requests: milliseconds after it was sent until each of POINTS, then LENGTHS of the passes that
    were over before its token came, and its time without them. What nobody told of is left out.

    records   of the workers of one system
    together  whether others were there at the same time: then only of the passes, whoever they were for
    """
    rows = [_passes_of(records, one) if together else _row(records, one) for one in asked]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: round(statistics.median(row[name] for row in rows if name in row), 2) for name in names}


def _row(records: Sequence[Record], asked: Asked) -> dict[str, float]:
    row: dict[str, float] = {}
    for point in POINTS:
        for record in records:
            at_s = record.get(point.field, 0.0)
            tells = record["role"] in point.roles and record["who"] == point.who
            if tells and asked.sent_s <= at_s <= asked.first_s:
                row[point.label] = 1e3 * (at_s - asked.sent_s)
    return row | _passes_of(records, asked)


def _passes_of(records: Sequence[Record], asked: Asked) -> dict[str, float]:
    row = {CLIENT: 1e3 * (asked.first_s - asked.sent_s)}
    passes = _until(asked.first_s, [one for one in records if one["who"] == PASS and asked.sent_s <= one["began_time"]])
    for label, at_s in _ends_of(passes).items():
        row[label] = 1e3 * (at_s - asked.sent_s)
    for name in LENGTHS:
        if told := [one[name] for one in passes if name in one]:
            row[f"pass {name}"] = sum(told)
    if "pass gpu_ms" in row:
        row[BESIDE] = row[CLIENT] - row["pass gpu_ms"]
    return row


def _until(at_s: float, passes: Sequence[Record]) -> list[Record]:
    """Those that were over by then, with their end: the GPU computes one after the other, each once it was launched. Of
    which no time on the GPU is known, those that had begun."""
    found, end_s = [], 0.0
    for one in sorted(passes, key=lambda one: one["began_time"]):
        end_s = max(end_s, one["began_time"]) + one.get("gpu_ms", 0.0) / 1e3
        if end_s <= at_s:
            found.append({**one, "end_time": end_s})
    return found


def _ends_of(passes: Sequence[Record]) -> dict[str, float]:
    """When the first of a request's passes was put into its stream, and when the GPU was through with the last one."""
    found = {}
    if passes:
        found[LAUNCHED] = passes[0]["began_time"]
    if passes and all("gpu_ms" in one for one in passes):
        found[COMPUTED] = passes[-1]["end_time"]
    return found
