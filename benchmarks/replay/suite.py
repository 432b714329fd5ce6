"""Every policy on every trace of a folder, two processes at a time."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import msgspec

from benchmarks.replay.cluster import ORACLE
from benchmarks.replay.row import LANES, Row, measure
from benchmarks.replay.scenario import Scenario, speed_of
from benchmarks.traces.load import load
from benchmarks.traces.trace import Trace
from router.policies import POLICIES

TRACES = ("mooncake_conversation_trace", "SYNTHETIC_toolmix", "claude_code_sessions")
CAPACITIES = (1_000_000, 3_000_000)
WORKERS = 8
EVERYBODY = (*POLICIES, ORACLE)
QUICK_PART = 12
"""A quick suite replays one of so many sessions, and one of so many seconds."""
GARBAGE_THRESHOLDS = (200_000, 50, 100)
"""A replay makes hardly any cycles: looking for them as often as usual takes a tenth of its time."""


@dataclass(frozen=True, slots=True)
class Cell:
    file: Path
    capacity_tokens: int
    policy: str
    quick: bool


def files(folder: Path, wanted: Sequence[str] = TRACES) -> list[Path]:
    """The suite's traces in a folder, packed or plain. Raises ValueError where one is missing."""
    found = []
    for name in wanted:
        candidates = sorted(folder.glob(f"{name}.jsonl*"))
        if not candidates:
            raise ValueError(f"--suite: wanted {name}.jsonl or {name}.jsonl.zst in {folder}, found none")
        found.append(candidates[0])
    return found


def open_loop(path: Path, name: str) -> Trace:
    """The trace in this file, or of this name in this folder. Raises OSError, and ValueError for a closed loop."""
    (file,) = files(path, (name,)) if path.is_dir() else (path,)
    trace = load(file)
    trace.arrivals()
    return trace


def run(traces: Sequence[Path], policies: Sequence[str], processes: int, quick: bool) -> Iterator[Row]:
    """A row for each cell, as they are done."""
    cells = [
        Cell(file, capacity_tokens, policy, quick)
        for file in traces
        for capacity_tokens in CAPACITIES
        for policy in policies
    ]
    # Long ones first, so that the last process does not run alone for long.
    cells.sort(key=lambda cell: cell.file.stat().st_size, reverse=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, initializer=gc.set_threshold, initargs=GARBAGE_THRESHOLDS) as pool:
        futures = [pool.submit(_measure, cell) for cell in cells]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def count(traces: Sequence[Path], policies: Sequence[str]) -> int:
    """Rows that `run` will give."""
    return len(traces) * len(CAPACITIES) * len(policies)


def _measure(cell: Cell) -> Row:
    trace = _trace(cell.file, cell.quick)
    scenario = Scenario(
        workers=WORKERS,
        capacity_tokens=cell.capacity_tokens,
        speed=speed_of(trace),
        page_tokens=trace.page_tokens,
    )
    row, _ = measure(trace, scenario, cell.policy, "sglang", LANES if trace.closed else 1.0, search=not cell.quick)
    return row


@cache
def _trace(file: Path, quick: bool) -> Trace:
    trace = load(file)
    if not quick:
        return trace
    return first_part(trace, QUICK_PART)


def first_part(trace: Trace, parts: int) -> Trace:
    """The first of so many equal parts: of its sessions, or of its time."""
    if trace.closed:
        return msgspec.structs.replace(trace, sessions=trace.sessions[: max(1, len(trace.sessions) // parts)])
    end_s = trace.arrivals()[-1][0] / parts
    return trace.only(lambda turn: turn.at_s is not None and turn.at_s <= end_s)
