"""Pages that running requests use, counted once however many share them, as Dynamo's router tracks them."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence


class ActiveBlocks:
    """Of one worker. A request's pages are a whole prefix, so the pages in use are closed under "comes before"."""

    def __init__(self) -> None:
        self._requests: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._requests)

    def with_request(self, ids: Sequence[int]) -> int:
        """How many there would be with this prompt's."""
        shared = bisect_left(range(len(ids)), True, key=lambda place: ids[place] not in self._requests)
        return len(self._requests) + len(ids) - shared

    def add(self, ids: Sequence[int]) -> None:
        self._requests.update(ids)

    def remove(self, ids: Sequence[int]) -> None:
        """Only what was added."""
        for page in ids:
            if self._requests[page] == 1:
                del self._requests[page]
            else:
                self._requests[page] -= 1
