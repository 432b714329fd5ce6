"""The requests of a simulated worker that get a token with every decode step.

Sums over them are kept as they start and stop, relative to the count of steps, and not with every
step: many steps cost no more than one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import heappop, heappush

from engine.sim_request import Request


class RunningBatch:
    """Requests in the order in which they started.

    step  decode steps since the start of the worker
    """

    def __init__(self, page_tokens: int) -> None:
        self.step = 0
        self._page = page_tokens
        self._requests: dict[int, Request] = {}
        self._kv_base = 0
        """Sum of what `kv_base` is for each."""
        self._left_base = 0
        """Sum of the steps at which each would have its longest possible answer."""
        self._longest = 0
        """Bound on the longest answer of any that ever ran."""
        self._page_steps: list[int] = []
        """For each, the steps modulo the page at which it begins a page. Sorted."""
        self._ends: list[tuple[int, int, int]] = []
        """Last step, number of the start, rid. Lazy: starts that were stopped are skipped."""
        self._starts: dict[int, int] = {}
        """Number of the start that counts, by rid."""
        self._started = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())

    def start(self, request: Request) -> None:
        """From now on it gets tokens: its KV has `fill` tokens, and it has `generated`."""
        request.place = "running"
        request.kv_base = request.fill - self.step
        request.end_step = self.step + request.output - request.generated
        self._requests[request.rid] = request
        self._started += 1
        self._starts[request.rid] = self._started
        heappush(self._ends, (request.end_step, self._started, request.rid))
        self._kv_base += request.kv_base
        self._left_base += request.end_step + request.max_new - request.output
        self._longest = max(self._longest, request.max_new)
        insort(self._page_steps, -request.kv_base % self._page)

    def stop(self, request: Request) -> None:
        """Brings the request's own account up to date, and forgets it. `fill` is then what a new start would need."""
        kv_tokens = self.kv_tokens(request)
        request.generated = self.generated(request)
        request.fill = kv_tokens + 1
        request.done = kv_tokens
        request.private = -(-kv_tokens // self._page) - request.shared
        del self._requests[request.rid], self._starts[request.rid]
        self._kv_base -= request.kv_base
        self._left_base -= request.end_step + request.max_new - request.output
        del self._page_steps[bisect_left(self._page_steps, -request.kv_base % self._page)]

    def kv_tokens(self, request: Request) -> int:
        return request.kv_base + self.step

    def generated(self, request: Request) -> int:
        return request.output - (request.end_step - self.step)

    @property
    def context_tokens(self) -> int:
        """KV tokens of all."""
        return self._kv_base + self.step * len(self._requests)

    def may_need_tokens(self, bound: int) -> int:
        """Tokens that all may answer yet, of each at most `bound`."""
        if self._longest <= bound:
            return self._left_base - self.step * len(self._requests)
        return sum(min(one.max_new - self.generated(one), bound) for one in self)

    def pages_begun(self, steps: int) -> int:
        """Pages that the next `steps` steps begin."""
        rounds, rest = divmod(steps, self._page)
        begun = rounds * len(self._page_steps)
        if rest:
            low = self.step % self._page
            high = low + rest
            begun += bisect_left(self._page_steps, high) - bisect_left(self._page_steps, low)
            if high > self._page:
                begun += bisect_left(self._page_steps, high - self._page)
        return begun

    def steps_to_end(self) -> int:
        """Steps until the first of them ends. There has to be one."""
        while self._starts.get(self._ends[0][2]) != self._ends[0][1]:
            heappop(self._ends)
        return self._ends[0][0] - self.step

    def advance(self, steps: int) -> list[Request]:
        """So many steps pass; returns those that have all their tokens now. They are not stopped."""
        self.step += steps
        ended: list[Request] = []
        while self._ends and self._ends[0][0] <= self.step:
            _, start, rid = heappop(self._ends)
            if self._starts.get(rid) == start:
                ended.append(self._requests[rid])
        return ended
