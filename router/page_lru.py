"""A prefix cache on paper: which pages a worker would hold, the least recently used leaf dropped first.

A use of a prompt touches its pages from the last to the first. So a page is always older than what
comes before it, the oldest page is a leaf, and an ordered dict is all that is needed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence


class PageLru:
    """Pages by chain id, at most `capacity_pages`."""

    def __init__(self, capacity_pages: int) -> None:
        self.capacity_pages = capacity_pages
        self._pages: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def match(self, ids: Sequence[int]) -> int:
        """Leading pages of `ids` that are held."""
        return bisect_left(range(len(ids)), True, key=lambda page: ids[page] not in self._pages)

    def use(self, ids: Sequence[int]) -> None:
        """The prompt was computed: its pages are held, and the latest used."""
        pages = self._pages
        for page in reversed(ids):
            pages[page] = None
            pages.move_to_end(page)
        while len(pages) > self.capacity_pages:
            pages.popitem(last=False)
