"""Who is next where requests have to wait: tenants share what there is by tokens, not by how many requests they send.

Start-time fair queueing: each request stands at a virtual time, the later of now and the end of the one before it of
its tenant, and takes as long there as it has tokens to compute; the one with the least start is next. A tenant that
sends a thousand requests at once waits behind itself. Its own requests keep their order.

It is bounded. When it is full, a request of a tenant with fewer waiting than the busiest one takes the place of the
busiest one's last.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field


class Full(Exception):
    """No place for one more request of this tenant."""


@dataclass(slots=True, eq=False)
class Waiting:
    """A request in the queue."""

    tenant: str
    tokens: int
    start: float
    number: int
    """In the order of arrival: decides between equals."""
    gone: bool = field(default=False)
    """It is not in the queue any more."""

    def __lt__(self, other: Waiting) -> bool:
        return (self.start, self.number) < (other.start, other.number)


class FairQueue:
    """limit  requests at most"""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._now = 0.0
        self._ends: dict[str, float] = {}
        """By tenant, where its next one starts."""
        self._of: dict[str, deque[Waiting]] = {}
        """By tenant, its requests in their order."""
        self._heap: list[Waiting] = []
        self._length = 0
        self._number = 0

    def __len__(self) -> int:
        return self._length

    @property
    def tokens(self) -> int:
        """Of all requests that wait."""
        return sum(waiting.tokens for some in self._of.values() for waiting in some)

    def enter(self, tenant: str, tokens: int) -> tuple[Waiting, Waiting | None]:
        """A request has to wait. Returns its place, and a request that lost its own to it. Raises Full."""
        pushed_out = self._make_room(tenant) if self._length >= self._limit else None
        mine = self._of.setdefault(tenant, deque())
        # Never before one of its own that waits: what another gave back is used up behind those.
        start = max(self._now, self._ends.get(tenant, 0.0), mine[-1].start if mine else 0.0)
        self._number += 1
        waiting = Waiting(tenant, tokens, start, self._number)
        self._ends[tenant] = start + tokens
        mine.append(waiting)
        self._length += 1
        heapq.heappush(self._heap, waiting)
        return waiting, pushed_out

    def first(self) -> Waiting | None:
        """Whose turn it is."""
        while self._heap and self._heap[0].gone:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None

    def leave(self, waiting: Waiting, *, served: bool) -> None:
        """It waits no more. Calling it again changes nothing.

        served  it got what it waited for, rather than that it gave up
        """
        if waiting.gone:
            return
        waiting.gone = True
        self._length -= 1
        rest = self._of[waiting.tenant]
        rest.remove(waiting)
        if served:
            self._now = max(self._now, waiting.start)
        elif rest:
            # The next one need not wait for what it did not take.
            self._ends[waiting.tenant] -= waiting.tokens
        if not rest:
            del self._of[waiting.tenant]
        if not self._length:
            # What a tenant took is held against it only while others wait.
            self._now = max(self._ends.values())
        self._ends = {tenant: end for tenant, end in self._ends.items() if tenant in self._of or end > self._now}

    def _make_room(self, tenant: str) -> Waiting:
        busiest = max(self._of, key=lambda name: len(self._of[name]), default=tenant)
        if not self._of or len(self._of[busiest]) <= len(self._of.get(tenant, ())) + 1:
            raise Full
        last = self._of[busiest][-1]
        self.leave(last, served=False)
        return last
