"""One cell of the hand-off benchmark: how many pages of which size, and which ones in which repetition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from transfer.layout import PoolLayout
from transfer.plan import Pages

LEAST_POOL_BYTES = 64 << 20
"""Twice the last-level cache of a usual server core's share: pages come from memory, as they do in serving."""
MOST_MOVED_BYTES = 512 << 20
"""Larger cells are left out: they say nothing new, and take gigabytes on both sides."""
REPEATED_BYTES = 512 << 20
LEAST_REPETITIONS, MOST_REPETITIONS = 3, 100
AUX = [b"t" * 64, b"p" * 128]
"""A request's auxiliary rows, about as long as SGLang's short ones."""

Order = Literal["random", "neighbours"]


@dataclass(frozen=True)
class Cell:
    pages: int
    page_bytes: int
    order: Order = "random"
    """Whether the pages of a request lie anywhere in both pools, or one behind the other."""

    def __str__(self) -> str:
        return f"{self.pages} x {short(self.page_bytes)}{'' if self.order == 'random' else ' ' + self.order}"

    @property
    def moved_bytes(self) -> int:
        return self.pages * self.page_bytes

    @property
    def layout(self) -> PoolLayout:
        """Of either pool, which is at least twice as large as what is moved."""
        pool_pages = max(LEAST_POOL_BYTES, 2 * self.moved_bytes) // self.page_bytes
        rows = tuple(len(row) for row in AUX)
        return PoolLayout("benchmark", "uint8", 1, (self.page_bytes,), rows, pool_pages)

    @property
    def repetitions(self) -> int:
        return max(LEAST_REPETITIONS, min(MOST_REPETITIONS, REPEATED_BYTES // self.moved_bytes))

    def choose(self, seed: int, repetition: int) -> tuple[Pages, Pages]:
        """The source and the destination pages: the same in every process."""
        return choose(self.order, self.pages, self.layout.pages, (seed, repetition))

    def everywhere(self) -> tuple[Pages, Pages]:
        """Every page of either pool, to warm up with."""
        chooser = np.random.default_rng(0)
        return _permuted(chooser, self.layout.pages), _permuted(chooser, self.layout.pages)


def choose(order: Order, pages: int, pool_pages: int, seed: tuple[int, int]) -> tuple[Pages, Pages]:
    """So many source and destination pages of pools of this size."""
    chooser = np.random.default_rng(seed)
    if order == "random":
        return _permuted(chooser, pool_pages)[:pages], _permuted(chooser, pool_pages)[:pages]
    first_source, first_destination = chooser.integers(0, pool_pages - pages, 2)
    neighbours = np.arange(pages, dtype=np.int32)
    return neighbours + np.int32(first_source), neighbours + np.int32(first_destination)


def _permuted(chooser: np.random.Generator, count: int) -> Pages:
    return chooser.permutation(count).astype(np.int32)


def short(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB" if size_bytes >= 1 << 20 else f"{size_bytes >> 10} KiB"
