"""Sets of workers as small numbers, one row for each set that some page has.

    page's row ──> masks  [ {} | {0} | {0,1} | ... ]     a bit for each worker
                   pages  [  - |  3  |   9   | ... ]     how many pages have this row

Many pages have the same holders, so 512 workers cost a page no more than one does, and whether two
pages have the same holders is a comparison of two small numbers. A row without pages is used again.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress

import numpy as np
import numpy.typing as npt

EMPTY = 0
"""The row of the empty set. It is always there."""
ROW_BYTES = 180
"""The most that a row takes beside its mask, the dictionary at its emptiest."""

_DIGITS_TO_FLAGS = bytes.maketrans(b"01", b"\0\1")


class HolderSets:
    """Rows by mask and masks by row."""

    def __init__(self) -> None:
        self.masks: list[int] = [0]
        """Bits of the workers, by row."""
        self._pages = array("q", [0])
        self._rows: dict[int, int] = {0: EMPTY}
        self._free: list[int] = []
        self._mask_bytes = 0

    def __len__(self) -> int:
        """Sets that some page has, the empty one left out."""
        return len(self._rows) - 1

    @property
    def bytes(self) -> int:
        """Memory taken."""
        containers = (self.masks, self._pages, self._rows, self._free)
        return sum(map(sys.getsizeof, containers)) + self._mask_bytes + 32 * len(self.masks)

    @property
    def needed_bytes(self) -> int:
        """What the present sets can take at most. Unlike `bytes` it falls at once when a set is no longer needed."""
        return len(self) * ROW_BYTES + self._mask_bytes

    def take(self, mask: int, pages: int) -> int:
        """The row of this set, which so many more pages have now."""
        row = self._rows.get(mask)
        if row is None:
            row = self._add(mask)
        self._pages[row] += pages
        return row

    def give(self, row: int, pages: int) -> None:
        """So many pages have this row no more."""
        left = self._pages[row] = self._pages[row] - pages
        if not left and row != EMPTY:
            mask = self.masks[row]
            del self._rows[mask]
            self._mask_bytes -= sys.getsizeof(mask)
            self.masks[row] = 0
            self._free.append(row)

    def rows_with(self, bit: int) -> npt.NDArray[np.bool_]:
        """By row: whether this worker is in the set."""
        return np.fromiter((mask >> bit & 1 for mask in self.masks), np.bool_, len(self.masks))

    def _add(self, mask: int) -> int:
        if self._free:
            row = self._free.pop()
            self.masks[row] = mask
        else:
            row = len(self.masks)
            self.masks.append(mask)
            self._pages.append(0)
        self._rows[mask] = row
        self._mask_bytes += sys.getsizeof(mask)
        return row


def members(mask: int, names: Sequence[str]) -> Iterator[str]:
    """Names of the workers in the set; names[b] is that of bit b."""
    # The digits of the number are its bits, highest first: written out and looked at without a step of Python for each.
    return compress(names, format(mask, "b").encode().translate(_DIGITS_TO_FLAGS)[::-1])


def bits(mask: int) -> Iterable[int]:
    """Numbers of the bits that are set, lowest first."""
    flags = format(mask, "b").encode().translate(_DIGITS_TO_FLAGS)[::-1]
    return compress(range(len(flags)), flags)
