"""The benchmark of hand-offs moves real pages between real processes, and notices when they are wrong."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.handoff import MEMCPY, measure, measure_way, summary
from benchmarks.unfinished import Unfinished
from benchmarks.ways import cell as cells
from benchmarks.ways.cell import Cell
from benchmarks.ways.memory import DecodeMemory, WrongByte, compare, over, wipe
from benchmarks.ways.prefill_process import Open, running_prefill
from benchmarks.ways.registry import PrefillWays, missing

SMALL = Cell(3, 16384)
WAYS = ["shm", "shm-staged", "tcp", "sockets"]

pytestmark = pytest.mark.thorough


@pytest.fixture(autouse=True)
def few_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "MOST_REPETITIONS", 3)


def test_every_way_is_measured_against_memcpy_and_leaves_no_process() -> None:
    ways = [*WAYS, *(way for way in ("nixl", "nixl-raw") if missing(way) is None)]

    samples = measure(ways, [SMALL], 1, 2, Unfinished(None))

    for way in ways:
        found = summary(way, SMALL, samples)
        assert found["us_p50"] > 0
        assert found["us_p99"] >= found["us_p50"]
        assert found["cpu_us_per_page"] > 0
        assert found["ratio_to_memcpy"] > 0
    assert summary(MEMCPY, SMALL, samples)["ratio_to_memcpy"] == 1
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("way", WAYS)
def test_a_byte_that_is_not_the_sent_one_ends_the_benchmark(way: str) -> None:
    size_bytes = SMALL.layout.pages * SMALL.page_bytes
    memory = DecodeMemory(size_bytes)
    source, _ = SMALL.choose(1, 0)
    memory.source[int(source[-1]) * SMALL.page_bytes + 100] ^= 1  # Decode now wants another byte than prefill holds.
    with running_prefill(PrefillWays, size_bytes) as prefill, pytest.raises(WrongByte, match=f"page {source[-1]}"):
        measure_way(Open(way, SMALL, 1, 1, None), memory, prefill)


def test_pages_that_landed_earlier_do_not_pass_for_what_lands_next() -> None:
    memory = DecodeMemory(SMALL.layout.pages * SMALL.page_bytes)
    sent, landed = over(memory.source, SMALL), over(memory.shared, SMALL)
    source, destination = SMALL.choose(1, 0)
    landed.buffers[0][destination] = sent.buffers[0][source]
    compare(landed, destination, sent, source)

    wipe(landed, destination)

    with pytest.raises(WrongByte):
        compare(landed, destination, sent, source)


@pytest.mark.parametrize("cell", [SMALL, replace(SMALL, order="neighbours"), Cell(4096, 131072)])
def test_pages_are_chosen_alike_in_every_process_each_at_most_once(cell: Cell) -> None:
    source, destination = cell.choose(4, 2)

    assert all(np.array_equal(one, other) for one, other in zip(cell.choose(4, 2), (source, destination), strict=True))
    assert not np.array_equal(cell.choose(4, 1)[0], source)
    for pages in (source, destination):
        assert len(set(pages.tolist())) == cell.pages
        assert 0 <= pages.min() <= pages.max() < cell.layout.pages
