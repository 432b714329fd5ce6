"""From a prompt's pages to a pair of workers, and back: what became of it corrects what is expected.

    choose ──> Decision ──> send ──> Flight ──> prefilled | failed ──> ended
       ^                      │                     │
       │ fleet, index,        └── load, expected    └── cost model learns
       └ expected, cost model     pages, shadows

The same for a router behind sockets and for a replay in virtual time: time is an argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from router.config import RouterSection
from router.cost import CostModel, Work
from router.decision import Decision
from router.expected import Expected
from router.fleet import FeedMode, Fleet, Ticket, Worker
from router.pairs import Pairs
from router.policies import make_policy
from router.policy import Ask, DecodeView, Policy, PrefillView
from router.shadow import Shadows
from transfer.ended import Ended

APPROXIMATE_TRUST = 0.5
"""What a page is worth that a worker may hold."""
STRETCH_REQUESTS = 8
"""A worker's time is compared with its work when it becomes idle, or after so many prefills: of a
few in a row, one's time holds a part of the next one's work, as they are computed in chunks together."""


@dataclass(slots=True)
class Flight:
    """One request that was sent."""

    number: int
    decision: Decision
    ticket: Ticket
    work: Work
    neighbours: int
    """Requests that ran on its decode worker when it was sent."""


@dataclass(slots=True)
class _Stretch:
    """Prefills of one worker that ended since its time was last compared with its work."""

    work: Work = field(default_factory=Work)
    seconds: float = 0.0


class Placement:
    """Chooses for one router, by the policy that its section names."""

    def __init__(self, section: RouterSection, fleet: Fleet) -> None:
        self.model = CostModel(section.cost)
        self.policy: Policy = make_policy(section.policy, section.cost, section.seed)
        self.shadows = Shadows(section, self.model)
        self.expected = Expected()
        self._fleet = fleet
        self._alpha = section.cost.alpha
        self._number = 0
        self._stretches: dict[str, _Stretch] = {}
        self._unsure: set[str] = set()
        """Workers of which it is not known when they began with what they compute now."""

    def choose(
        self,
        prefills: Sequence[Worker],
        decodes: Sequence[Worker],
        held: Mapping[str, int],
        ids: Sequence[int],
        prompt_tokens: int,
        page_tokens: int,
        session: str,
        now_s: float,
        guessed: bool = False,
    ) -> Decision:
        """The pair for one request. Raises policy.NoWorker.

        held     leading pages of `ids` by worker, as the index knows them
        ids      chain ids of the prompt's whole pages; none where they are not known
        guessed  whether `prompt_tokens` is a guess: nothing is learned from such a request
        """
        self._number += 1
        self.expected.expire(now_s)
        ask = Ask(
            number=self._number,
            prompt_tokens=prompt_tokens,
            page_tokens=page_tokens,
            guessed=guessed,
            ids=ids,
            session=session,
            now_s=now_s,
        )
        # What is kept to explain the choice needs no copy of the prompt's ids.
        pairs = Pairs(
            msgspec.structs.replace(ask, ids=()),
            [self._prefill_view(worker, held.get(worker.name, 0), ids, now_s) for worker in prefills],
            [_decode_view(worker, held.get(worker.name, 0)) for worker in decodes],
            self.model,
        )
        pick = self.policy.choose(ask, pairs)
        return Decision(pairs, pick, self.policy.name, self._alpha)

    def send(self, decision: Decision, ids: Sequence[int], now_s: float, new_tokens: int = 0) -> Flight:
        """The request goes to the workers of its decision now.

        new_tokens  for which decode is expected to need room, beside the prompt's
        """
        ask = msgspec.structs.replace(decision.pairs.ask, ids=ids)
        prefill, decode = decision.prefill, decision.decode
        work = Work.of(decision.uncached_tokens, decision.prompt_tokens)
        neighbours = decision.pick.decode.running_requests
        ticket = self._fleet.dispatch(
            prefill,
            decode,
            decision.prompt_tokens,
            decision.uncached_tokens,
            self.model.work_s(prefill, work),
            now_s,
            slots(decision.prompt_tokens, decision.pick.decode.held_pages, ask.page_tokens, new_tokens),
        )
        self.expected.sent(ask.number, prefill, ids, min(len(ids), decision.matched_pages))
        self.policy.sent(ask, prefill, decode)
        self.shadows.observe(ask, decision.pairs.prefills)
        return Flight(ask.number, decision, ticket, work, neighbours)

    def prefilled(self, flight: Flight, now_s: float, cached_tokens: int | None = None) -> None:
        """Its prompt was computed. Calling it again changes nothing.

        cached_tokens  what the engine had of it, where it has said so
        """
        if not flight.ticket.prefilling:
            return
        if flight.decision.pairs.ask.guessed:
            self.failed(flight, now_s)
            return
        worker = flight.ticket.prefill
        if cached_tokens is not None:
            prompt_tokens = flight.decision.prompt_tokens
            flight.work = Work.of(max(1, prompt_tokens - cached_tokens), prompt_tokens)
        self._learn(worker, flight.work, now_s - worker.working_since_s)
        self._take_off(flight, now_s)
        self.expected.prefilled(flight.number, now_s)

    def failed(self, flight: Flight, now_s: float) -> None:
        """It will not be computed, or when that was is not known. Calling it again changes nothing."""
        if not flight.ticket.prefilling:
            return
        # What the worker did in this time is not known, nor how much of the next prefill it did in it.
        worker = flight.ticket.prefill
        self._take_off(flight, now_s)
        if self._fleet.get(worker.name) is worker:
            self._stretches.pop(worker.name, None)
            if worker.outstanding_prefills:
                self._unsure.add(worker.name)
            else:
                self._unsure.discard(worker.name)
        self.expected.failed(flight.number)

    def ended(self, flight: Flight, now_s: float, itl_s: float | None = None, tokens: int = 0) -> None:
        """It is over. Of a request without `prefilled`, when it was computed is not known."""
        self.failed(flight, now_s)
        if itl_s is not None:
            self.model.learn_decode(flight.neighbours, itl_s, tokens)
        self._fleet.finished(flight.ticket, now_s)
        self.expected.ended(flight.number)
        self.policy.ended(flight.number)

    def handed_over(self, ended: Ended, decode: str) -> None:
        """A hand-off is over."""
        if not ended.reason and ended.prefill in self._fleet and decode in self._fleet:
            self.model.learn_transfer(ended.prefill, decode, ended.moved_bytes, ended.writing_s)

    def lost(self, worker: str) -> None:
        """The worker is gone or begins a new life: nothing is expected of it."""
        self.expected.forget(worker)
        self.policy.lost(worker)
        self.shadows.lost(worker)
        self.model.forget(worker)
        self._stretches.pop(worker, None)
        self._unsure.discard(worker)

    def _take_off(self, flight: Flight, now_s: float) -> None:
        self._fleet.prefilled(flight.ticket, now_s)
        self.policy.prefilled(flight.number)

    def _learn(self, worker: Worker, work: Work, seconds: float) -> None:
        if self._fleet.get(worker.name) is not worker:
            # Its last life has ended since, and that says nothing of the present one.
            return
        if worker.name in self._unsure:
            self._unsure.discard(worker.name)
            return
        if elsewhere_s := worker.elsewhere.outstanding_s:
            # It did other routers' prefills in this time too: about as many as wait there beside ours.
            seconds *= worker.outstanding_s / (worker.outstanding_s + elsewhere_s)
        stretch = self._stretches.setdefault(worker.name, _Stretch())
        stretch.work = stretch.work.plus(work)
        stretch.seconds += seconds
        if worker.outstanding_prefills > 1 and stretch.work.requests < STRETCH_REQUESTS:
            return
        self.model.learn_prefill(worker.name, stretch.work, stretch.seconds)
        del self._stretches[worker.name]

    def _prefill_view(self, worker: Worker, held_pages: int, ids: Sequence[int], now_s: float) -> PrefillView:
        registration, elsewhere = worker.registration, worker.elsewhere
        name, trust = registration.worker, _trust(worker.mode)
        if not trust:
            held_pages = 0
        expected_pages = self.expected.pages(name, ids, held_pages)
        return PrefillView(
            name=name,
            held_pages=held_pages,
            expected_pages=expected_pages,
            sharing_requests=self.expected.sharing(name, ids[expected_pages - 1]) if expected_pages else 0,
            trust=trust,
            wait_s=worker.wait_s(now_s) + elsewhere.outstanding_s,
            outstanding_tokens=worker.outstanding_uncached_tokens + elsewhere.outstanding_tokens,
            outstanding_requests=worker.outstanding_prefills + elsewhere.outstanding_requests,
            inflight_requests=worker.inflight_requests + elsewhere.inflight_requests,
            recent_tokens=worker.recent.at(now_s),
            capacity_tokens=registration.capacity_tokens,
            alone=registration.role == "both",
        )


def slots(prompt_tokens: int, held_pages: int, page_tokens: int, new_tokens: int) -> int:
    """KV slots that a request takes where it decodes and so many of its pages are there already."""
    return max(0, prompt_tokens - held_pages * page_tokens) + new_tokens


def _decode_view(worker: Worker, held_pages: int) -> DecodeView:
    registration = worker.registration
    return DecodeView(
        name=registration.worker,
        held_pages=held_pages if _trust(worker.mode) else 0,
        running_requests=worker.running_requests,
        inflight_tokens=worker.inflight_tokens + worker.elsewhere.inflight_tokens,
        capacity_tokens=registration.capacity_tokens,
        alone=registration.role == "both",
    )


def _trust(mode: FeedMode) -> float:
    """What a page is worth that a worker is said to hold."""
    if mode is FeedMode.EXACT:
        return 1.0
    return APPROXIMATE_TRUST if mode is FeedMode.APPROXIMATE else 0.0
