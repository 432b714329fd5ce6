"""Where a page's node is: an open-addressing hash table from page ids to slots.

    entries   [ -1 | 7 | 3 | -1 | 5 | ... ]       slots; a power of two of them, at most half in use
    ids       slot -> page id                     the index's own column, read here and never written

Ids are hashes already, so their low bits are the place to look; a place that is taken leads to the next.
A removed entry leaves no mark: those after it move up. So a table in which pages came and went for a
year is as fast as a new one. A dictionary would cost ten times the memory, most of it for the numbers.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

import numpy as np

NONE = -1
"""The slot that is no slot."""
SMALLEST = 64
"""Entries of an empty table."""
MOST_ENTRY_BYTES = 16
"""Of the table, for one page: just after it was doubled, a quarter of its entries is in use."""


class PageTable:
    """Slots by page id. Two slots may have one id: `find` gives one of them, `remove` takes those it is told.

    ids  page id by slot
    """

    def __init__(self, ids: array[int]) -> None:
        self._ids = ids
        self._entries = array("i", [NONE]) * SMALLEST
        self._mask = SMALLEST - 1
        self._used = 0

    def __len__(self) -> int:
        return self._used

    @property
    def bytes(self) -> int:
        return sys.getsizeof(self._entries)

    def find(self, page: int) -> int:
        """The slot of this page, or NONE."""
        entries, ids, mask = self._entries, self._ids, self._mask
        at = page & mask
        while (slot := entries[at]) != NONE:
            if ids[slot] == page:
                return slot
            at = at + 1 & mask
        return NONE

    def add(self, slots: Sequence[int]) -> None:
        """Notes these slots, whose ids are in the column."""
        self._used += len(slots)
        if 2 * self._used > len(self._entries):
            self._grow(slots)
            return
        entries, ids, mask = self._entries, self._ids, self._mask
        for slot in slots:
            at = ids[slot] & mask
            while entries[at] != NONE:
                at = at + 1 & mask
            entries[at] = slot

    def remove(self, slots: Sequence[int]) -> None:
        """Forgets these slots, which must be here."""
        entries, ids, mask = self._entries, self._ids, self._mask
        for slot in slots:
            hole = ids[slot] & mask
            while entries[hole] != slot:
                hole = hole + 1 & mask
            at = hole + 1 & mask
            while (later := entries[at]) != NONE:
                # It may move up to the hole unless it would come to stand before its own place.
                if at - ids[later] & mask >= at - hole & mask:
                    entries[hole] = later
                    hole = at
                at = at + 1 & mask
            entries[hole] = NONE
        self._used -= len(slots)

    def _grow(self, added: Sequence[int]) -> None:
        """Makes a larger table of what is here and these slots: in numpy, as a million steps of Python take a second.

        Sorted by the place where each wants to be, an entry's place is that, or the one after the entry before it.
        """
        size = len(self._entries)
        while 2 * self._used > size:
            size *= 2
        old = np.asarray(self._entries)
        slots = np.concatenate([old[old != NONE], np.array(added, np.int32)])
        del old
        homes = np.asarray(self._ids)[slots] & np.uint64(size - 1)
        order = np.argsort(homes, kind="stable")
        steps = np.arange(len(slots))
        places = steps + np.maximum.accumulate(homes[order].astype(np.int64) - steps)
        inside = places < size
        entries = np.full(size, NONE, np.int32)
        entries[places[inside]] = slots[order][inside]
        self._entries, self._mask = array("i"), size - 1
        self._entries.frombytes(entries.tobytes())
        beyond: list[int] = slots[order][~inside].tolist()
        if beyond:  # the end of the table was full: on from its beginning
            self._used -= len(beyond)
            self.add(beyond)
