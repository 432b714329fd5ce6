"""Replay a recorded workload through our routing, in virtual time, and compare policies.

    python -m benchmarks.replay --trace FILE --policy mainstem,round_robin --workers 8 --capacity-tokens 3e6 --rate 1
    python -m benchmarks.replay --suite DIR --json

The router's own index, cost model and policy choose; simulated workers (`engine.sim`) stand for SGLang.
Nothing of a time here is a claim about hardware: ratios between policies are what it is for.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import machine, report
from benchmarks.replay import suite
from benchmarks.replay.cluster import ORACLE
from benchmarks.replay.outcome import Outcome
from benchmarks.replay.plots import draw_outcomes, draw_suite
from benchmarks.replay.row import LANES, Row, measure
from benchmarks.replay.scenario import Scenario, Speed, speed_of
from benchmarks.traces.load import FORMATS, load
from router.policies import POLICIES

COLUMNS = (
    "trace",
    "M tokens",
    "workers",
    "policy",
    "hit %",
    "TTFT mean",
    "p50",
    "p90",
    "p99",
    "imbalance",
    "sustained",
)


def main(words: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(words)
    try:
        return _suite(options) if options.suite else _one(options)
    except (OSError, ValueError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("replay: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = report.arguments(__doc__ or "")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--trace", type=Path, metavar="FILE", help="a trace, packed by zstd or plain")
    what.add_argument("--suite", type=Path, metavar="DIR", help=f"all policies on {', '.join(suite.TRACES)}")
    parser.add_argument("--format", choices=FORMATS, help="of the trace; default: by its first line")
    parser.add_argument(
        "--policy", default=",".join(suite.EVERYBODY), metavar="NAME,…", help=f"of {', '.join(suite.EVERYBODY)}"
    )
    parser.add_argument("--workers", type=int, default=suite.WORKERS, help="that prefill and decode")
    parser.add_argument("--pairs", metavar="PxD", help="prefill and decode workers instead, such as 6x2")
    parser.add_argument("--capacity-tokens", type=float, default=3e6, help="KV of one worker, in tokens")
    parser.add_argument(
        "--slowness",
        default="1",
        metavar="N,…",
        help="times as slow as usual, of the workers in turn; nobody tells the router",
    )
    parser.add_argument("--rate", type=float, default=1.0, help="open loop: times the trace's speed")
    parser.add_argument("--lanes", type=int, default=LANES, help="closed loop: sessions at a time")
    parser.add_argument("--prefill-tokens-per-s", type=float, help="of one worker; default: by the trace")
    parser.add_argument("--page-tokens", type=int, help="a multiple of the trace's blocks; default: by its format")
    parser.add_argument("--model", choices=("sglang", "fifo"), default="sglang", help="of a worker (fifo: on paper)")
    parser.add_argument("--sustained", action="store_true", help="look for the largest load within the objective too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a twelfth of each trace; of a suite, no search for loads")
    parser.add_argument("--processes", type=int, default=2, help="of a suite, at a time")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw what was found")
    return parser


def _policies(options: argparse.Namespace) -> list[str]:
    names = [name.strip() for name in options.policy.split(",") if name.strip()]
    for name in names:
        if name not in (*POLICIES, ORACLE):
            raise ValueError(f"--policy: wanted of {', '.join(suite.EVERYBODY)}, found {name!r}")
    return names


def _slowness(text: str, model: str) -> tuple[float, ...]:
    try:
        found = tuple(float(one) for one in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < one < inf for one in found):
        raise ValueError(f"--slowness: wanted numbers above 0 such as 1,1,2, found {text!r}")
    if model == "fifo" and set(found) != {1.0}:
        raise ValueError(f"--slowness: wanted --model sglang with it, found --model {model}: its workers are equal")
    return found


def _one(options: argparse.Namespace) -> int:
    trace = load(options.trace, options.format, options.page_tokens)
    if options.quick:
        trace = suite.first_part(trace, suite.QUICK_PART)
    prefill, decode = _pairs(options.pairs)
    speed = speed_of(trace)
    if options.prefill_tokens_per_s:
        speed = Speed(options.prefill_tokens_per_s, speed.objective_s)
    scenario = Scenario(
        workers=options.workers,
        prefill=prefill,
        decode=decode,
        capacity_tokens=int(options.capacity_tokens),
        speed=speed,
        slowness=_slowness(options.slowness, options.model),
        seed=options.seed,
        page_tokens=trace.page_tokens,
    )
    load_ = options.lanes if trace.closed else options.rate
    rows: list[Row] = []
    outcomes: dict[str, Outcome] = {}
    with _progress() as progress:
        for policy in _policies(options):
            task = progress.add_task(policy, total=trace.requests)
            row, outcomes[policy] = measure(
                trace,
                scenario,
                policy,
                options.model,
                load_,
                options.sustained,
                lambda done, task=task: progress.update(task, completed=done),  # type: ignore[misc]
            )
            rows.append(row)
    _publish(rows, options.json)
    if options.plot:
        title = f"{trace.name}{' (synthetic)' if trace.synthetic else ''}, load {load_:g}, {machine.one_line()}"
        draw_outcomes(outcomes, title, options.plot)
    return 0


def _suite(options: argparse.Namespace) -> int:
    traces, policies = suite.files(options.suite), _policies(options)
    rows: list[Row] = []
    with _progress() as progress:
        task = progress.add_task("suite", total=suite.count(traces, policies))
        for row in suite.run(traces, policies, options.processes, options.quick):
            rows.append(row)
            done = f"{row.trace} {row.policy}"
            progress.update(task, advance=1, description=done)
            if not progress.console.is_terminal:
                report.progress(f"{len(rows)} of {progress.tasks[task].total:g}: {done}")
    order = {name: place for place, name in enumerate(policies)}
    rows.sort(key=lambda row: (row.trace, row.capacity_tokens, order[row.policy]))
    _publish(rows, options.json)
    if options.plot:
        draw_suite(rows, options.plot)
    return 0


def _pairs(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 0
    prefill, _, decode = text.partition("x")
    if not (prefill.isdigit() and decode.isdigit() and int(prefill) and int(decode)):
        raise ValueError(f"--pairs: wanted PxD such as 6x2, found {text!r}")
    return int(prefill), int(decode)


@contextmanager
def _progress() -> Iterator[Progress]:
    columns = TextColumn("{task.description:<40}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield progress


def _publish(rows: Sequence[Row], as_json: bool) -> None:
    if as_json:
        for row in rows:
            print(json.dumps(row.json()))
        print(json.dumps({"machine": machine.describe()}))
        return
    table = [
        (
            row.trace + (" (synthetic)" if row.synthetic else ""),
            f"{row.capacity_tokens / 1e6:g}",
            row.workers,
            row.policy,
            f"{100 * row.hit_rate:.1f}",
            row.ttft_s_mean,
            row.ttft_s_p50,
            row.ttft_s_p90,
            row.ttft_s_p99,
            row.imbalance,
            "" if row.sustainable_load is None else row.sustainable_load,
        )
        for row in rows
    ]
    report.publish({}, COLUMNS, table, as_json=False)


if __name__ == "__main__":
    sys.exit(main())
