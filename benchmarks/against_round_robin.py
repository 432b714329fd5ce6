"""Where would turns do better? Our policy beside round_robin, at loads that round_robin keeps up with.

    python -m benchmarks.against_round_robin DIR [--json] [--processes 2]

DIR holds the traces; they are not copied into the project. Virtual time, the replay's cluster, 2 to 64 workers that
prefill and decode, the first REQUESTS requests of each trace. One of them shares no prefix with another: there,
nothing can be won.

Load is kept equal for each worker. Open loop: load 1 is the trace's own speed on 8 workers, so `rate`, the speed
that a trace is replayed at, is load * workers / 8. For large fleets that squeezes the trace's time: users of 64
workers at load 0.5 read and think four times as fast as those who were recorded. Closed loop: load is sessions
at a time for each worker.

A load counts as stable where round_robin does not fall behind: open loop, its mean TTFT of the second half is at
most GROWS times that of the first. A closed loop cannot fall behind, as nobody comes before an answer. Only there is
ours asked. `in_time` says whether round_robin also kept the trace's objective for 90 % of the requests, which
is a matter of the hardware too. Rows with a ratio above WORSE are what must not be.
"""

from __future__ import annotations

import multiprocessing
import sys
from argparse import ArgumentTypeError
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from benchmarks import report
from benchmarks.replay.outcome import Outcome
from benchmarks.replay.row import replay
from benchmarks.replay.scenario import Scenario, speed_of
from benchmarks.traces.load import load
from benchmarks.traces.trace import Session, Trace
from router.baselines.round_robin import RoundRobin
from router.pair_cost import PairCost

OPEN_LOADS = (0.1, 0.25, 0.5, 0.75)
CLOSED_LOADS = (1, 2, 4, 8)
WORKERS = (2, 4, 8, 16, 32, 64)
USUAL_WORKERS = 8
"""That a trace's own speed is meant for."""
CAPACITY_TOKENS = 3_000_000
REQUESTS = 3000
GROWS = 1.5
WORSE = 1.02


class Source(NamedTuple):
    """One trace of the folder.

    speed  times its own, at which 8 usual workers are busy for 60 % of the time at most
    """

    name: str
    loads: Sequence[float]
    speed: float = 1.0


SOURCES = (
    Source("mooncake_conversation_trace", OPEN_LOADS),
    Source("SYNTHETIC_toolmix", OPEN_LOADS),
    # Its own speed is for other hardware: here it would leave 8 workers idle for 9/10 of the time.
    Source("AzureLLMInferenceTrace_conv", OPEN_LOADS, speed=5.0),
    Source("claude_code_sessions", CLOSED_LOADS),
)


@dataclass(frozen=True, slots=True)
class Cell:
    file: Path
    source: Source
    workers: int
    load: float


COLUMNS = (
    "trace",
    "workers",
    "load",
    "stable",
    "in time",
    "mean / round_robin's",
    "p99 / round_robin's",
    "round_robin mean, p99 s",
    "ours",
    "hit % round_robin, ours",
)


def cells(folder: Path, workers: Sequence[int] = WORKERS) -> list[Cell]:
    """Raises ValueError where a trace is missing."""
    found = []
    for source in SOURCES:
        files = sorted(folder.glob(f"{source.name}.*"))
        if not files:
            raise ValueError(f"wanted {source.name} in {folder}, found none")
        found += [Cell(files[0], source, count, load) for count in workers for load in source.loads]
    return found


def beginning(trace: Trace, requests: int, lanes: int) -> Trace:
    """About so many requests: the first ones, or of twice as many sessions as there are lanes the first turns."""
    if not trace.closed:
        wanted = {turn.number for _, _, turn in trace.arrivals()[:requests]}
        return trace.only(lambda turn: turn.number in wanted)
    sessions = trace.sessions[: 2 * lanes]
    turns = max(1, requests // len(sessions))
    return msgspec.structs.replace(trace, sessions=[Session(one.id, one.turns[:turns]) for one in sessions])


def is_stable(outcome: Outcome, closed: bool) -> bool:
    """Whether the load is one that the policy keeps up with."""
    if outcome.refused:
        return False
    if closed:
        return True
    middle_s = sorted(outcome.arrived_s)[len(outcome.arrived_s) // 2]
    second = outcome.since(middle_s)
    first_s = sum(outcome.ttft_s) - sum(second.ttft_s)
    first_requests = len(outcome.ttft_s) - len(second.ttft_s)
    return second.ttft_mean * first_requests <= GROWS * first_s


def measure(cell: Cell) -> dict[str, Any] | None:
    """The row: what round_robin came to, and ours beside it where that was stable. Times in seconds.

    None where the trace has not as many sessions as would be wanted at a time.
    """
    whole = _trace(cell.file)
    lanes = int(cell.load * cell.workers) if whole.closed else 0
    if lanes > len(whole.sessions):
        return None
    trace = beginning(whole, REQUESTS, lanes)
    rate = cell.load * cell.source.speed * cell.workers / USUAL_WORKERS
    speed = speed_of(trace)
    scenario = Scenario(
        workers=cell.workers, capacity_tokens=CAPACITY_TOKENS, speed=speed, page_tokens=trace.page_tokens
    )

    def run(policy: str) -> Outcome:
        return replay(trace, scenario, policy, "sglang", lanes if trace.closed else rate)

    turns = run(RoundRobin.name)
    stable = is_stable(turns, trace.closed)
    ours = run(PairCost.name) if stable else None
    return {
        "trace": trace.name,
        "synthetic": trace.synthetic,
        "workers": cell.workers,
        "load": cell.load,
        "rate": None if trace.closed else round(rate, 4),
        "lanes": lanes if trace.closed else None,
        "requests": trace.requests,
        "stable": stable,
        "in_time": turns.ttft(0.9) <= speed.objective_s,
        "round_robin": _summary(turns),
        "mainstem": None if ours is None else _summary(ours),
        "mean_ratio": None if ours is None else round(ours.ttft_mean / turns.ttft_mean, 4),
        "p99_ratio": None if ours is None else round(ours.ttft(0.99) / turns.ttft(0.99), 4),
    }


def rows(cells: Sequence[Cell], processes: int) -> Iterator[dict[str, Any]]:
    """As they are done."""
    # Large fleets first: they take the longest.
    order = sorted(cells, key=lambda cell: -cell.workers)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(measure, cell) for cell in order]
        try:
            for number, future in enumerate(as_completed(futures)):
                if (row := future.result()) is not None:
                    report.progress(f"  {number + 1} of {len(cells)}: {row['trace']}, {row['workers']} workers")
                    yield row
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def worst(rows: Sequence[dict[str, Any]], ratio: str) -> dict[str, Any] | None:
    """Of the stable ones; None where there are none."""
    return max((row for row in rows if row["stable"]), key=lambda row: row[ratio], default=None)


@cache
def _trace(file: Path) -> Trace:
    return load(file)


def _summary(outcome: Outcome) -> dict[str, float]:
    return {
        "hit_rate": round(outcome.hit_rate, 4),
        "ttft_s_mean": round(outcome.ttft_mean, 4),
        "ttft_s_p50": round(outcome.ttft(0.5), 4),
        "ttft_s_p90": round(outcome.ttft(0.9), 4),
        "ttft_s_p99": round(outcome.ttft(0.99), 4),
    }


def _cells_of(row: dict[str, Any]) -> tuple[object, ...]:
    turns, ours = row["round_robin"], row["mainstem"]
    return (
        row["trace"] + (" (synthetic)" if row["synthetic"] else ""),
        row["workers"],
        row["load"],
        "yes" if row["stable"] else "no",
        "yes" if row["in_time"] else "no",
        "" if ours is None else f"{row['mean_ratio']:.3f}",
        "" if ours is None else f"{row['p99_ratio']:.3f}",
        f"{turns['ttft_s_mean']:.3f}, {turns['ttft_s_p99']:.3f}",
        "" if ours is None else f"{ours['ttft_s_mean']:.3f}, {ours['ttft_s_p99']:.3f}",
        f"{100 * turns['hit_rate']:.1f}" + ("" if ours is None else f", {100 * ours['hit_rate']:.1f}"),
    )


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise ArgumentTypeError(f"wanted a folder of traces, found {text!r}")
    return Path(text)


def main(words: Sequence[str] | None = None) -> int:
    parser = report.arguments(__doc__ or "")
    parser.add_argument("folder", type=_folder, metavar="DIR", help=", ".join(source.name for source in SOURCES))
    parser.add_argument("--processes", type=int, default=2, help="at a time")
    options = parser.parse_args(words)
    try:
        wanted = cells(options.folder)
    except ValueError as error:
        parser.error(str(error))
    found = sorted(rows(wanted, options.processes), key=lambda row: (row["trace"], row["workers"], row["load"]))
    worst_of = {ratio: worst(found, ratio) for ratio in ("mean_ratio", "p99_ratio")}
    report.publish(
        {"benchmark": "against_round_robin", "capacity_tokens": CAPACITY_TOKENS, "worst": worst_of, "rows": found},
        COLUMNS,
        [_cells_of(row) for row in found],
        options.json,
    )
    if not options.json:
        for ratio, row in worst_of.items():
            if row is not None:
                print(f"worst {ratio}: {row[ratio]:.3f} ({row['trace']}, {row['workers']} workers, load {row['load']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
