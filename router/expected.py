"""Pages that workers are computing now: siblings that arrive before the events do are sent to them too.

    sent ──> expected ──(prefilled, and GRACE_S for the events to come)──> forgotten
                  └─────(failed, worker lost)────────────────────────────> forgotten at once

The index says what is stored; a page event comes after its page was computed and travels
for some milliseconds. Ten requests with one new system prompt that arrive within a
second would all find nothing. So what a request will leave behind counts from the moment
it is sent, and no longer than the truth needs to arrive.

Also counted here: how many requests in flight begin with a page, which makes a prefix hot.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

GRACE_S = 2.0
"""After a prefill, until its events are overdue: the router asks for lost ones within that time."""


@dataclass(slots=True)
class _Known:
    """One life of a worker."""

    pages: Counter[int] = field(default_factory=Counter)
    """Requests that compute a page."""
    shared: Counter[int] = field(default_factory=Counter)
    """Requests in flight that had all pages up to this one when they were sent."""


@dataclass(slots=True)
class _Sent:
    known: _Known
    ids: Sequence[int]
    """Pages that the worker is to compute, first page first; none once they are not expected any more."""
    shared: int | None
    """Last page before them; None once the request is over."""


class Expected:
    """By worker, what requests in flight will leave in its cache."""

    def __init__(self) -> None:
        self._workers: dict[str, _Known] = {}
        self._requests: dict[int, _Sent] = {}
        self._overdue: deque[tuple[float, int]] = deque()

    def __len__(self) -> int:
        """Requests that anything is kept of."""
        return len(self._requests)

    def sent(self, number: int, worker: str, ids: Sequence[int], matched_pages: int) -> None:
        """Request `number` goes to this worker, which has the first `matched_pages` of `ids` or is computing them."""
        known = self._workers.setdefault(worker, _Known())
        sent = _Sent(known, ids[matched_pages:], ids[matched_pages - 1] if matched_pages else None)
        self._requests[number] = sent
        known.pages.update(sent.ids)
        if sent.shared is not None:
            known.shared[sent.shared] += 1

    def pages(self, worker: str, ids: Sequence[int], held_pages: int) -> int:
        """Leading pages of `ids` that the worker holds, which is `held_pages` already, or will hold."""
        known = self._workers.get(worker)
        if known is None or held_pages >= len(ids) or ids[held_pages] not in known.pages:
            return held_pages
        return bisect_left(range(len(ids)), True, lo=held_pages, key=lambda page: ids[page] not in known.pages)

    def sharing(self, worker: str, page: int) -> int:
        """Requests in flight there that begin with this page and all before it, as far as was known of them."""
        known = self._workers.get(worker)
        return 0 if known is None else known.pages.get(page, 0) + known.shared.get(page, 0)

    def prefilled(self, number: int, now_s: float) -> None:
        """Its pages were computed: their events are under way."""
        self._overdue.append((now_s + GRACE_S, number))
        self.expire(now_s)

    def expire(self, now_s: float) -> None:
        """Events that have not come by now will not come."""
        while self._overdue and self._overdue[0][0] <= now_s:
            self.failed(self._overdue.popleft()[1])

    def failed(self, number: int) -> None:
        """Its pages will not come, or have come."""
        sent = self._requests.get(number)
        if sent is not None:
            _take_off(sent.known.pages, sent.ids)
            sent.ids = ()
            self._forget_if_over(number, sent)

    def ended(self, number: int) -> None:
        """The request is not in flight any more. Its pages are still expected until they are overdue."""
        sent = self._requests.get(number)
        if sent is not None and sent.shared is not None:
            _take_off(sent.known.shared, (sent.shared,))
            sent.shared = None
            self._forget_if_over(number, sent)

    def forget(self, worker: str) -> None:
        """The worker, or its cache, is gone: the next one of this name begins with nothing."""
        self._workers.pop(worker, None)

    def _forget_if_over(self, number: int, sent: _Sent) -> None:
        if not sent.ids and sent.shared is None:
            del self._requests[number]


def _take_off(counts: Counter[int], pages: Sequence[int]) -> None:
    for page in pages:
        counts[page] -= 1
        if counts[page] <= 0:
            del counts[page]
