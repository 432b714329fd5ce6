"""Pages from one GPU's pool to another's: how fast each way is, from "pages are ready" to "decode's thread knows".

Two processes, each with a pool on a GPU of its own, or on the same where there is one (then no link is crossed, and the
copies compete with each other). A row is one page of one buffer; there are 64 buffers, K and V of 32 layers, and pages
lie at random places on both sides, as they do after hours of traffic; "neighbours" lie one behind the other. Page
indices come from the CPU inside the clock. Every cell runs every way in every round; a number is the median over
rounds of each round's median. Some rows are compared in two repetitions of each round.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from types import FrameType
from typing import Any

from benchmarks import report
from benchmarks.bench_cluster import run_main
from benchmarks.machine import gpus
from benchmarks.ways.ends import DecodeEnd, HandOffFailed
from benchmarks.ways.gpu import (
    BASELINE,
    WAYS,
    GpuCell,
    GpuPrefillWays,
    compare,
    decode_end,
    devices,
    missing,
    too_slow,
)
from benchmarks.ways.memory import WrongByte
from benchmarks.ways.prefill_process import Open, PrefillProcess, Send, running_prefill
from transfer.cuda import CudaFailed, Device
from transfer.gpu_memory import GpuMemory
from transfer.layout import PoolLayout

CELLS = (
    GpuCell(1, 128 << 10),
    GpuCell(8, 128 << 10),
    GpuCell(64, 128 << 10),
    GpuCell(64, 128 << 10, "neighbours"),
    GpuCell(8192, 2 << 10),
)
ROUNDS = 3
MOST_S, LEAST_REPETITIONS = 1.5, 5
"""A round of a way that takes seconds for one hand-off ends early."""
PATIENCE_S = 20.0
LOOK_EVERY_S = 0.5
"""So often the main thread looks whether it waits in vain."""
COLUMNS = {
    "cell": "cell",
    "way": "way",
    "GB/s": "gb_per_s",
    "p50 us": "us_p50",
    "p99 us": "us_p99",
    "of the copy engine's": "ratio",
}
Times = dict[tuple[str, GpuCell], list[list[float]]]
"""Microseconds of each repetition of each round."""


def main(argv: Sequence[str]) -> int:
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(WAYS), help=f"of {', '.join(WAYS)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"how many (default {ROUNDS})")
    parser.add_argument(
        "--patience",
        type=float,
        default=PATIENCE_S,
        metavar="S",
        help=f"a way is given up on in a cell of which one round takes longer (default {PATIENCE_S:g} seconds)",
    )
    options = parser.parse_args(argv)
    if unknown := [name for name in options.only if name not in WAYS]:
        parser.error(f"--only: wanted some of {', '.join(WAYS)}, found {', '.join(unknown)}")
    logging.getLogger("transfer").setLevel(logging.ERROR)
    try:
        here, there = devices()
    except CudaFailed as error:
        report.progress(f"handoff --gpu: wanted a GPU, found none: {error}")
        return 2
    ways = [BASELINE]
    for way in options.only:
        if reason := missing(way):
            report.progress(f"  {way} left out: {reason}")
        elif way != BASELINE:
            ways.append(way)
    times, failed = measure(ways, options.rounds, options.patience, here, there)
    results = [summary(way, cell, times) for cell in CELLS for way in ways if (way, cell) in times]
    link = "two GPUs" if here != there else "one GPU: no link is crossed"
    result = {"gpus": gpus(), "between": link, "rounds": options.rounds, "results": results, "failed": failed}
    report.publish(result, tuple(COLUMNS), [[row[key] for key in COLUMNS.values()] for row in results], options.json)
    if not options.json:
        print(f"{', '.join(gpus())}; {link}")
        for one, reason in failed.items():
            print(f"{one}: {reason}")
    # Some of the engines measured here crash when a process ends that has used them: the result is out by then.
    sys.stdout.flush()
    os._exit(0)


def measure(ways: Sequence[str], rounds: int, patience_s: float, here: int, there: int) -> tuple[Times, dict[str, str]]:
    """Every repetition's time; and why a way came to nothing, by way and cell."""
    times: Times = {}
    failed: dict[str, str] = {}
    device = Device(there)
    memories: dict[PoolLayout, GpuMemory] = {}
    with _Prefills(here) as prefills:
        for cell in CELLS:
            if cell.layout not in memories:
                memories[cell.layout] = GpuMemory(device, cell.layout)
            for number, way in itertools.product(range(rounds), ways):
                name = f"{way}, {cell}"
                if name in failed:
                    continue
                if reason := too_slow(way, cell):
                    failed[name] = reason
                    continue
                request = Open(way, cell, 2, number, None)
                try:
                    took_us = measure_way(request, memories[cell.layout], prefills.of(way), patience_s)
                except (WrongByte, HandOffFailed, CudaFailed) as error:
                    prefills.end(way)
                    failed[name] = str(error)
                    report.progress(f"  {name}: {error}")
                    continue
                times.setdefault((way, cell), []).append(took_us)
                report.progress(f"  round {number + 1} of {rounds}, {name}: {statistics.median(took_us):.0f} us")
    for memory in memories.values():
        memory.free()
    return times, failed


class _Prefills:
    """A process for each way: what one leaves behind (UCX's settings, mappings) is not the next one's."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._running: dict[str, tuple[ExitStack, PrefillProcess]] = {}

    def __enter__(self) -> _Prefills:
        return self

    def __exit__(self, *error: object) -> None:
        for way in list(self._running):
            self.end(way)

    def of(self, way: str) -> PrefillProcess:
        if way not in self._running:
            stack = ExitStack()
            self._running[way] = stack, stack.enter_context(running_prefill(GpuPrefillWays, self._device))
        return self._running[way][1]

    def end(self, way: str) -> None:
        """The next one of this way is a new one."""
        stack, _ = self._running.pop(way)
        stack.close()


@contextmanager
def limited(patience_s: float) -> Iterator[None]:
    """Raises HandOffFailed inside when so much time has passed, or when a prefill process has ended meanwhile: no way's
    own waiting knows of either."""
    until_s = time.monotonic() + patience_s
    running = len(multiprocessing.active_children())

    def look(_signal: int, _frame: FrameType | None) -> None:
        reason = None
        if len(multiprocessing.active_children()) < running:
            reason = "the prefill process is gone; its error is above"
        elif time.monotonic() > until_s:
            reason = f"given up: one round was not over after {patience_s:g} s"
        if reason is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise HandOffFailed(reason)

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, LOOK_EVERY_S, LOOK_EVERY_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure_way(request: Open, memory: GpuMemory, prefill: PrefillProcess, patience_s: float) -> list[float]:
    """One round of one way and cell, in microseconds. Raises WrongByte, HandOffFailed, CudaFailed."""
    end = decode_end(request.way, memory, request.lanes)
    try:
        with limited(patience_s):
            return _measure_end(end, request, memory, prefill)
    finally:
        end.close()


def _measure_end(end: DecodeEnd, request: Open, memory: GpuMemory, prefill: PrefillProcess) -> list[float]:
    cell, seed = request.cell, request.seed
    done_s: list[float] = []
    end.join(prefill.open(Open(request.way, cell, request.lanes, seed, end.describe())))
    end.expect(1, cell.everywhere()[1])
    prefill.tell(Send(1, None))
    end.wait(1)
    until_s = time.monotonic() + MOST_S
    for repetition in range(cell.repetitions):
        if repetition >= LEAST_REPETITIONS and time.monotonic() > until_s:
            break
        source, destination = cell.choose(seed, repetition)
        # The baseline's pages are not the chosen ones.
        checked = repetition in (0, LEAST_REPETITIONS - 1) and request.way != BASELINE
        if checked:
            memory.wipe(destination)
        room = 2 + repetition
        end.expect(room, destination)
        prefill.tell(Send(room, repetition))
        done_s.append(end.wait(room))
        if checked:
            compare(memory, destination, source, seed)
    spent = prefill.close()
    return [(done - began) * 1e6 for done, began in zip(done_s, spent.began_s, strict=True)]


def summary(way: str, cell: GpuCell, times: Times) -> dict[str, Any]:
    def median_us(name: str) -> float:
        return statistics.median(statistics.median(one) for one in times[name, cell])

    p50_us = median_us(way)
    every = sorted(itertools.chain(*times[way, cell]))
    return {
        "cell": str(cell),
        "way": way,
        **asdict(cell),
        "gb_per_s": round(cell.moved_bytes / p50_us / 1e3, 1),
        "us_p50": round(p50_us, 1),
        "us_p99": round(every[int(0.99 * (len(every) - 1))], 1),
        "ratio": round(median_us(BASELINE) / p50_us, 3) if (BASELINE, cell) in times else None,
    }


if __name__ == "__main__":
    sys.exit(run_main(lambda: main(sys.argv[1:])))
