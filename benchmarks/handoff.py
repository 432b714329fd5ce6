"""Pages from one process to another: how fast each way of handing them over is, and what it costs.

Two processes with pools as a prefill and a decode worker have them, a real handshake, pages at
random places on both sides. One hand-off is timed from the moment at which prefill hands its
pages over to the moment from which decode may use them. The bytes are compared in the first and
the last repetition of each round. Rounds run every way once for every cell, so that all meet the
same machine; a number is the median over rounds of each round's median.

memcpy is one thread that copies the same pages inside one process: `ratio_to_memcpy` is its time
over the way's. Cells above 512 MiB are left out. On a busy machine `chrt -r 1 python -m
benchmarks.handoff` shows the ways rather than the neighbours: ways that spin suffer most from those.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks import handoff_gpu, memcpy, report
from benchmarks.bench_cluster import run_main
from benchmarks.unfinished import Unfinished, continue_argument
from benchmarks.ways.cell import MOST_MOVED_BYTES, Cell
from benchmarks.ways.ends import HandOffFailed
from benchmarks.ways.memory import DecodeMemory, WrongByte, compare, over, wipe
from benchmarks.ways.prefill_process import Open, PrefillProcess, Send, running_prefill
from benchmarks.ways.registry import WAYS, PrefillWays, decode_end, missing
from benchmarks.ways.sample import Sample

MEMCPY = "memcpy"
PAGES = (1, 64, 512, 4096)
PAGE_BYTES = (2048, 16384, 131072, 2097152)
NEIGHBOURS = (Cell(64, 16384, "neighbours"), Cell(512, 131072, "neighbours"), Cell(4096, 2048, "neighbours"))
"""A fresh pool gives a request pages that lie one behind the other."""
QUICK = (Cell(1, 16384), Cell(64, 16384), Cell(512, 131072))
SHORT, LONG = Cell(64, 16384), Cell(512, 131072)
"""The cells of the summary."""
ROUNDS = 5
COLUMNS = {
    "way": "transport",
    "pages": "pages",
    "bytes": "page_bytes",
    "order": "order",
    "GB/s": "gb_per_s",
    "p50 us": "us_p50",
    "p99 us": "us_p99",
    "CPU us/page": "cpu_us_per_page",
    "of memcpy": "ratio_to_memcpy",
}
Samples = dict[tuple[str, Cell], list[Sample]]


def main() -> int:
    if "--gpu" in sys.argv:
        return handoff_gpu.main([argument for argument in sys.argv[1:] if argument != "--gpu"])
    options = arguments()
    # Each pair is taken apart again, and says that it lost its peer.
    logging.getLogger("transfer").setLevel(logging.ERROR)
    cells = QUICK if options.quick else chosen_cells(options.pages, options.page_bytes)
    ways = chosen_ways(options.only)
    rounds = 1 if options.quick else options.rounds
    try:
        samples = measure(ways, cells, rounds, options.lanes, Unfinished(options.unfinished))
    except (WrongByte, HandOffFailed) as error:
        report.progress(f"handoff: {error}")
        return 1
    results = [summary(way, cell, samples) for cell in cells for way in (MEMCPY, *ways)]
    result = {"rounds": rounds, "lanes": options.lanes, "results": results, "ratios": ratios(samples)}
    report.publish(result, tuple(COLUMNS), [[row[key] for key in COLUMNS.values()] for row in results], options.json)
    if not options.json:
        for name, value in result["ratios"].items():
            print(f"{name} {value}")
    return 0


def arguments() -> argparse.Namespace:
    parser = report.arguments(__doc__ or "")
    ways = ", ".join(WAYS)
    parser.add_argument("--gpu", action="store_true", help="pools on GPUs instead; --gpu --help says more")
    parser.add_argument("--quick", action="store_true", help="one round of three cells, under a minute")
    parser.add_argument("--only", type=_names, default=[], help=f"some of {ways}; memcpy is always measured")
    parser.add_argument("--pages", type=_numbers, default=PAGES, help="pages of a hand-off, as 1,64")
    parser.add_argument("--page-bytes", type=_numbers, default=PAGE_BYTES, help="bytes of a page, as 2048,16384")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"how many (default {ROUNDS})")
    parser.add_argument("--lanes", type=int, default=2, help="connections of tcp (default 2)")
    continue_argument(parser)
    options = parser.parse_args()
    if unknown := [name for name in options.only if name not in WAYS]:
        parser.error(f"--only: wanted some of {ways}, found {', '.join(unknown)}")
    return options


def chosen_ways(only: Sequence[str]) -> list[str]:
    ways = []
    for way in only or WAYS:
        if reason := missing(way):
            report.progress(f"  {way} left out: {reason}")
        else:
            ways.append(way)
    return ways


def chosen_cells(pages: Sequence[int], page_bytes: Sequence[int]) -> list[Cell]:
    cells = []
    for count, size_bytes in itertools.product(pages, page_bytes):
        cell = Cell(count, size_bytes)
        if cell.moved_bytes > MOST_MOVED_BYTES:
            report.progress(f"  {cell} left out: more than {MOST_MOVED_BYTES >> 20} MiB")
            continue
        cells.append(cell)
    return cells + [cell for cell in NEIGHBOURS if Cell(cell.pages, cell.page_bytes) in cells]


def measure(ways: Sequence[str], cells: Sequence[Cell], rounds: int, lanes: int, unfinished: Unfinished) -> Samples:
    """Every round's sample of every way and cell. Raises WrongByte, HandOffFailed."""
    samples: Samples = {}
    memory_bytes = max(cell.layout.pages * cell.page_bytes for cell in cells)
    memory = DecodeMemory(memory_bytes)
    with running_prefill(PrefillWays, memory_bytes) as prefill:
        for number, cell in itertools.product(range(rounds), cells):
            names = [MEMCPY, *ways]
            first = number % len(names)
            said = []
            # Each round begins with another way: none always follows the same one.
            for way in names[first:] + names[:first]:
                unit = {"round": number, "way": way, "lanes": lanes, **asdict(cell)}
                work = _work(way, cell, memory, prefill, number, lanes)
                sample = Sample(**unfinished.once(unit, work))
                samples.setdefault((way, cell), []).append(sample)
                said.append(f"{way} {sample.us_p50:.0f}")
            report.progress(f"  round {number + 1} of {rounds}, {cell}: {', '.join(said)} us")
    return samples


def _work(
    way: str, cell: Cell, memory: DecodeMemory, prefill: PrefillProcess, number: int, lanes: int
) -> Callable[[], dict[str, Any]]:
    if way == MEMCPY:
        return lambda: asdict(memcpy.measure(cell, memory, number))
    return lambda: asdict(measure_way(Open(way, cell, lanes, number, None), memory, prefill))


def measure_way(request: Open, memory: DecodeMemory, prefill: PrefillProcess) -> Sample:
    """One round of one way and cell. Raises WrongByte, HandOffFailed."""
    cell, way, lanes, seed = request.cell, request.way, request.lanes, request.seed
    sent = over(memory.source, cell)
    end = decode_end(way, cell, memory, lanes)
    done_s: list[float] = []
    cpu_s = 0.0
    try:
        end.join(prefill.open(Open(way, cell, lanes, seed, end.describe())))
        # Every page of both pools once: a mapping's pages are there when something is timed.
        end.expect(1, cell.everywhere()[1])
        prefill.tell(Send(1, None))
        end.wait(1)
        for repetition in range(cell.repetitions):
            source, destination = cell.choose(seed, repetition)
            checked = repetition in (0, cell.repetitions - 1)
            if checked:
                wipe(end.pool, destination)
            room = 2 + repetition
            cpu_before_s = time.process_time()
            end.expect(room, destination)
            prefill.tell(Send(room, repetition))
            done_s.append(end.wait(room))
            cpu_s += time.process_time() - cpu_before_s
            if checked:
                compare(end.pool, destination, sent, source)
        spent = prefill.close()
    finally:
        end.close()
    took_s = [done - began for done, began in zip(done_s, spent.began_s, strict=True)]
    return Sample.of(took_s, cpu_s + spent.cpu_s, cell)


def summary(way: str, cell: Cell, samples: Samples) -> dict[str, Any]:
    mine = samples[way, cell]
    p50_us = statistics.median(sample.us_p50 for sample in mine)
    return {
        "transport": way,
        **asdict(cell),
        "gb_per_s": round(cell.moved_bytes / p50_us / 1e3, 2),
        "us_p50": round(p50_us, 1),
        "us_p99": round(statistics.median(sample.us_p99 for sample in mine), 1),
        "cpu_us_per_page": round(statistics.median(sample.cpu_us_per_page for sample in mine), 3),
        "ratio_to_memcpy": faster(way, MEMCPY, cell, samples),
    }


def faster(way: str, baseline: str, cell: Cell, samples: Samples) -> float:
    """The baseline's time over the way's: the median of the rounds' ratios, as both met the same machine in a round."""
    pairs = zip(samples[way, cell], samples[baseline, cell], strict=True)
    return round(statistics.median(theirs.us_p50 / mine.us_p50 for mine, theirs in pairs), 3)


def ratios(samples: Samples) -> dict[str, float]:
    """What the project promises of hand-offs, where it was measured."""
    found: dict[str, float] = {}
    if ("shm", SHORT) in samples:
        found["shm_64_x_16_kib_us_p50"] = round(statistics.median(one.us_p50 for one in samples["shm", SHORT]), 1)
    for way, baseline in (("shm", MEMCPY), ("shm", "shm-staged"), ("tcp", "nixl-raw"), ("nixl", "nixl-raw")):
        if (way, LONG) in samples and (baseline, LONG) in samples:
            found[f"{way}_over_{baseline}_512_x_128_kib"] = faster(way, baseline, LONG, samples)
    return found


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    sys.exit(run_main(main))
