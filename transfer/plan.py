"""Which pages go where, joined into runs so that neighbours are copied at once.

source pages   4 5 6 9        destination   1 2 3 4
runs           (4 -> 1, 3 pages), (9 -> 4, 1 page)
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Pages = npt.NDArray[np.int32]
"""Page indices, one-dimensional."""
_FEW = 32
"""Pages that Python looks through sooner than numpy, of which a small write would see it."""


class Run(NamedTuple):
    """`pages` pages from `source` on go to the pages from `destination` on."""

    source: int
    destination: int
    pages: int


def runs(source: Pages, destination: Pages) -> list[Run]:
    """Runs of pages that are neighbours on both sides, in order. Raises ValueError for unequal lengths."""
    check_lengths(source, destination)
    if len(source) == 0:
        return []
    breaks = np.flatnonzero((np.diff(source) != 1) | (np.diff(destination) != 1)) + 1
    edges = (0, *breaks.tolist(), len(source))
    return [Run(int(source[start]), int(destination[start]), end - start) for start, end in pairwise(edges)]


def check_lengths(source: Pages, destination: Pages) -> None:
    """Raises ValueError unless there are as many of both."""
    if len(source) != len(destination):
        raise ValueError(f"pages: wanted as many destinations as sources, {len(source)}, found {len(destination)}")


def check_range(pages: Pages, limit: int) -> None:
    """Raises ValueError unless every index lies in [0, limit)."""
    if len(pages) <= _FEW:
        few = pages.tolist()
        within = not few or (min(few) >= 0 and max(few) < limit)
    else:
        # Read without a sign, one that is below zero is too large: one look at each instead of two.
        within = int(pages.view(np.uint32).max()) < limit
    if not within:
        raise ValueError(f"pages: wanted indices from 0 to {limit - 1}, found {int(pages.min())} to {int(pages.max())}")
