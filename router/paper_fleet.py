"""Prefill workers on paper: what a policy would have made of the same requests, without sending any.

Each worker is a prefix cache (`router.page_lru`) and one prefill at a time, first come first served,
for as long as the cost model says. That is enough to compare policies by: hits, balance, waiting.
It knows nothing of batches and decoding (`engine.sim` does): who decodes is nobody's choice here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

from router.cost import CostModel
from router.expected import Expected
from router.fleet import Recent
from router.page_lru import PageLru
from router.pairs import Pairs
from router.policy import Ask, DecodeView, Policy, PrefillView, usable_tokens

_NOBODY = DecodeView(name="paper")


@dataclass(frozen=True, slots=True)
class Placed:
    """One request on paper; of one that is refused, it never begins."""

    worker: str
    cached_tokens: int
    begins_s: float
    ends_s: float


@dataclass(slots=True)
class _Worker:
    name: str
    capacity_tokens: int
    cache: PageLru
    free_at_s: float = 0.0
    queue: deque[tuple[float, int]] = field(default_factory=deque)
    """(when it is done, request) of what is not done yet."""
    computed_tokens: int = 0
    recent: Recent = field(default_factory=Recent)


class PaperFleet:
    """One policy and its workers on paper.

    model           seconds of a prefill, for the policy and for the workers
    longest_wait_s  a request that would wait longer is refused
    """

    def __init__(self, policy: Policy, model: CostModel, longest_wait_s: float = inf) -> None:
        self.policy = policy
        self._longest_wait_s = longest_wait_s
        self.refused = 0
        self.requests = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self._model = model
        self._workers: dict[str, _Worker] = {}
        self._expected = Expected()

    @property
    def hit_rate(self) -> float:
        """Cached of all prompt tokens."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def imbalance(self) -> float:
        """What the busiest worker has computed, over the mean; 1 is even."""
        computed = [worker.computed_tokens for worker in self._workers.values()]
        return max(computed) * len(computed) / sum(computed) if sum(computed) else 1.0

    def place(self, ask: Ask, capacities: Mapping[str, int]) -> Placed:
        """Where the policy puts this request, and what comes of it. Time must not run backwards.

        capacities  KV tokens by worker: those that take requests now. Others keep what they hold.
        """
        for name, tokens in capacities.items():
            if name not in self._workers:
                self._workers[name] = _Worker(name, tokens, PageLru(max(1, tokens // ask.page_tokens)))
        for worker in self._workers.values():
            self._advance(worker, ask.now_s)
        prefills = [self._prefill_view(self._workers[name], ask) for name in sorted(capacities)]
        pick = self.policy.choose(ask, Pairs(ask, prefills, [_NOBODY], self._model))
        return self._send(ask, pick.prefill)

    def _send(self, ask: Ask, view: PrefillView) -> Placed:
        worker = self._workers[view.name]
        cached_tokens = usable_tokens(view.held_pages, ask.prompt_tokens, ask.page_tokens)
        uncached_tokens = ask.prompt_tokens - cached_tokens
        begins_s = max(ask.now_s, worker.free_at_s)
        self.requests += 1
        self.prompt_tokens += ask.prompt_tokens
        if begins_s - ask.now_s > self._longest_wait_s:
            self.refused += 1
            return Placed(worker.name, 0, inf, inf)
        worker.free_at_s = begins_s + self._model.prefill_s(worker.name, uncached_tokens, ask.prompt_tokens)
        worker.queue.append((worker.free_at_s, ask.number))
        worker.computed_tokens += uncached_tokens
        worker.recent.add(uncached_tokens, ask.now_s)
        worker.cache.use(ask.ids)
        self.cached_tokens += cached_tokens
        self._expected.sent(ask.number, worker.name, ask.ids, view.held_pages)
        self.policy.sent(ask, worker.name, _NOBODY.name)
        return Placed(worker.name, cached_tokens, begins_s, worker.free_at_s)

    def lost(self, name: str) -> None:
        """The worker is gone or begins a new life: what it held is gone, and its requests are over."""
        worker = self._workers.pop(name, None)
        if worker is not None:
            self._advance(worker, inf)
            self._expected.forget(name)
            self.policy.lost(name)

    def _advance(self, worker: _Worker, now_s: float) -> None:
        while worker.queue and worker.queue[0][0] <= now_s:
            _, number = worker.queue.popleft()
            self._expected.failed(number)
            self._expected.ended(number)
            self.policy.prefilled(number)
            self.policy.ended(number)

    def _prefill_view(self, worker: _Worker, ask: Ask) -> PrefillView:
        held_pages = worker.cache.match(ask.ids)
        wait_s = max(0.0, worker.free_at_s - ask.now_s)
        return PrefillView(
            name=worker.name,
            held_pages=held_pages,
            expected_pages=held_pages,
            sharing_requests=self._expected.sharing(worker.name, ask.ids[held_pages - 1]) if held_pages else 0,
            wait_s=wait_s,
            outstanding_tokens=self._model.tokens_in(wait_s),
            outstanding_requests=len(worker.queue),
            inflight_requests=len(worker.queue),
            recent_tokens=worker.recent.at(ask.now_s),
            capacity_tokens=worker.capacity_tokens,
        )
