"""A day of stores, evictions, lost workers and questions, in seconds: the index's memory must not creep."""

from __future__ import annotations

import gc
import sys
from collections import OrderedDict
from itertools import accumulate
from random import Random

import pytest

from router.index import NODE_BYTES, Index
from transfer.pages import chain_ids, root_id

ROOT = root_id("churn")
WORKERS = tuple(f"w{number}" for number in range(16))
SYSTEM_PAGES = 16
OWN_PAGES = 16


class Cluster:
    """Workers whose caches are full: each new conversation takes the place of the one that it had longest.

    conversations   how many there are; number n comes up as 1 / (n + 1)
    cached          conversations that fit into one worker's cache
    """

    def __init__(self, index: Index, conversations: int, cached: int) -> None:
        self.index = index
        self.pages = 0
        """Page stores and removals so far."""
        self._random = Random(1)
        self._cached = cached
        self._weights = list(accumulate(1 / (number + 1) for number in range(conversations)))
        self._conversations = range(conversations)
        self._systems = [chain_ids(ROOT, [1, system] * SYSTEM_PAGES, 2) for system in range(20)]
        self._held: dict[str, OrderedDict[int, list[int]]] = {name: OrderedDict() for name in WORKERS}

    def run(self, prompts: int) -> None:
        random, index = self._random, self.index
        for number in random.choices(self._conversations, cum_weights=self._weights, k=prompts):
            worker = random.choice(WORKERS)
            held = self._held[worker]
            system = self._systems[number % len(self._systems)]
            own = chain_ids(system[-1], [2, number] * random.randint(1, OWN_PAGES), 2)
            index.match(system + own)
            index.stored(worker, ROOT, 0, system)
            index.stored(worker, system[-1], len(system), own)
            self.pages += len(system) + len(own)
            held[number] = max(own, held.pop(number, own), key=len)
            while len(held) > self._cached:
                _, gone = held.popitem(last=False)
                index.removed(worker, gone[::-1] if random.random() < 0.5 else gone)
                self.pages += len(gone)
            if random.random() < 0.001:
                index.forget(worker)
                held.clear()


def churn(index: Index, conversations: int, cached: int, prompts: int, rounds: int) -> list[int]:
    """The index's bytes after each round. The first is over when every cache is full."""
    cluster = Cluster(index, conversations, cached)
    cluster.run(3 * prompts)
    index_bytes = []
    for _ in range(rounds):
        index_bytes.append(index.bytes)
        cluster.run(prompts)
    return [*index_bytes, index.bytes]


def assert_flat(index: Index, index_bytes: list[int]) -> None:
    slots = len(index._ids)
    assert max(index_bytes) <= 1.02 * index_bytes[0]
    assert max(index_bytes) <= index.max_bytes
    assert len(index._table._entries) <= max(64, 4 * slots)
    for name in WORKERS:
        index.forget(name)
    assert len(index) == len(index._table) == len(index._sets) == 0
    assert set(index._table._entries) == {-1}
    index.stored("w0", ROOT, 0, [7, 8, 9])
    assert len(index._ids) == slots  # those that are free are used again
    assert index.match([7, 8, 9]) == {"w0": 3}


@pytest.mark.parametrize("max_pages", [1000, 100_000], ids=["tight", "roomy"])
def test_churn_leaves_memory_flat(max_pages: int) -> None:
    index = Index(max_pages * NODE_BYTES)

    index_bytes = churn(index, conversations=400, cached=12, prompts=250, rounds=6)

    assert (index.evicted > 0) == (max_pages == 1000)
    assert_flat(index, index_bytes)


@pytest.mark.thorough
@pytest.mark.timeout(600)
@pytest.mark.parametrize("max_pages", [20_000, 1_000_000], ids=["tight", "roomy"])
def test_a_day_of_churn_leaves_memory_flat(max_pages: int) -> None:
    """Millions of pages stored and removed: each worker's cache is filled anew some fifty times."""
    index = Index(max_pages * NODE_BYTES)
    churn(index, conversations=20_000, cached=200, prompts=4_000, rounds=1)
    gc.collect()
    objects = sys.getallocatedblocks()

    index_bytes = churn(index, conversations=20_000, cached=200, prompts=4_000, rounds=40)

    gc.collect()
    assert sys.getallocatedblocks() < objects + 1000  # none for a page, of which there are sixteen thousand
    assert (index.evicted > 0) == (max_pages == 20_000)
    assert_flat(index, index_bytes)
