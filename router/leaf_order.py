"""The leaves of the index in the order in which they were last used: a doubly linked list in two columns.

    oldest ─ newer ─> . ─ newer ─> . ─ newer ─> newest

Whatever is done costs the same few steps however many leaves there are, and nothing piles up: a slot is
in the list once or not at all. A heap by time of use would hold an object for each leaf.
"""

from __future__ import annotations

import sys
from array import array

from router.page_table import NONE


class LeafOrder:
    """Slots, least recently used first."""

    def __init__(self) -> None:
        self._older = array("i")
        self._newer = array("i")
        self.oldest = NONE
        self._newest = NONE

    @property
    def bytes(self) -> int:
        return sys.getsizeof(self._older) + sys.getsizeof(self._newer)

    def extend(self, empty: array[int]) -> None:
        """Makes room for so many more slots, as NONE in each; none of them is in the list."""
        self._older.extend(empty)
        self._newer.extend(empty)

    def newer(self, slot: int) -> int:
        """The slot after this one, or NONE."""
        return self._newer[slot]

    def append(self, slot: int) -> None:
        """Puts a slot that is not in the list at its newest end."""
        newest = self._newest
        self._older[slot], self._newer[slot] = newest, NONE
        if newest == NONE:
            self.oldest = slot
        else:
            self._newer[newest] = slot
        self._newest = slot

    def remove(self, slot: int) -> None:
        """Takes a slot that is in the list out of it."""
        older, newer = self._older[slot], self._newer[slot]
        if older == NONE:
            self.oldest = newer
        else:
            self._newer[older] = newer
        if newer == NONE:
            self._newest = older
        else:
            self._older[newer] = older

    def touch(self, slot: int) -> None:
        """Moves a slot that is in the list to its newest end."""
        if slot != self._newest:
            self.remove(slot)
            self.append(slot)

    def replace(self, slot: int, other: int) -> None:
        """Puts a slot that is not in the list in the place of one that is."""
        older, newer = self._older[slot], self._newer[slot]
        self._older[other], self._newer[other] = older, newer
        if older == NONE:
            self.oldest = other
        else:
            self._newer[older] = other
        if newer == NONE:
            self._newest = other
        else:
            self._older[newer] = other
