"""What the router knows of its workers: who they are, whether they live, and what it has sent them.

    registered ──> starting ──> ready ──> draining
                                 │  ^
              lease not renewed  │  │ renewed, or a new epoch
                                 v  │
                                lost ──(forgotten after a while)

Load is counted when a request is dispatched, in tokens that the worker has to
compute, not when the worker reports it a second later: otherwise every request of
a burst goes to the same worker. A worker where a request failed is *suspect* until it
has answered a probe, and is taken only where nobody else is left (`router.health`); one
whose engine has not moved for long is *hung*, and gets nothing until it does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from router.gossip import NOTHING, Elsewhere, WorkerLoad
from router.health import Condition, Health
from transfer.wire import Registration, Role, WorkerState

FORGET_S = 60.0
"""How long a lost worker is still shown, and one that left is not let in again."""
MAX_LEFT = 4096
"""Workers that left and are remembered; of more, the earliest are forgotten."""
RECENT_HALF_LIFE_S = 60.0
"""Tokens sent this long ago count half when equals are told apart."""


class FeedMode(StrEnum):
    """What the index's pages of a worker are worth to a choice."""

    EXACT = "exact"
    """All of its pages are known."""
    APPROXIMATE = "approximate"
    """Something may be missing or gone: a gap is being closed, an audit failed, or not all has found room."""
    LOAD_ONLY = "load-only"
    """Nothing usable is known: first contact is under way, or the worker is cut off. Its load still counts."""


class Change(StrEnum):
    """What a registration changed."""

    NEW = "new"
    REPLACED = "replaced"
    RENEWED = "renewed"
    BACK = "back"
    LEFT = "left"
    STALE = "stale"


@dataclass(slots=True)
class Recent:
    """Tokens sent lately: a sum that halves every RECENT_HALF_LIFE_S."""

    tokens: float = 0.0
    at_s: float = 0.0

    def at(self, now_s: float) -> float:
        return self.tokens * math.exp2((self.at_s - now_s) / RECENT_HALF_LIFE_S)

    def add(self, tokens: float, now_s: float) -> None:
        self.tokens, self.at_s = self.at(now_s) + tokens, now_s


@dataclass(slots=True, eq=False)
class Worker:
    """One worker, in its present epoch."""

    registration: Registration
    seen_s: float
    lost: bool = False
    mode: FeedMode = FeedMode.LOAD_ONLY
    health: Health = field(default_factory=Health)
    hung: bool = False
    """Its engine has not moved for longer than any step of it takes."""
    inflight_requests: int = 0
    outstanding_uncached_tokens: int = 0
    """Prompt tokens sent to it that it has to compute and has not reported done."""
    outstanding_prefills: int = 0
    outstanding_s: float = 0.0
    """What the cost model expects those prefills to take, one after the other."""
    working_since_s: float = 0.0
    """When it began with the first of them: when the one before was done."""
    inflight_tokens: int = 0
    """Prompt tokens of the requests that decode there."""
    reserved_tokens: int = 0
    """KV slots that these requests are expected to take, beside what it held already."""
    requests: int = 0
    """Requests sent to it, since it was first seen."""
    recent: Recent = field(default_factory=Recent)
    elsewhere: Elsewhere = NOTHING
    """What other routers have in flight there, as they say."""

    @property
    def name(self) -> str:
        return self.registration.worker

    @property
    def role(self) -> Role:
        return self.registration.role

    @property
    def running_requests(self) -> int:
        """Requests in flight: the engine's count, or the routers' own, which is newer."""
        return max(self.inflight_requests + self.elsewhere.inflight_requests, self.registration.load.running_requests)

    def has_room(self, tokens: int) -> bool:
        """Whether a request that takes so many KV slots can decode there now. An idle worker has room for any."""
        if not self.inflight_requests:
            return True
        taken = self.reserved_tokens + self.elsewhere.inflight_tokens
        return taken + tokens <= self.registration.capacity_tokens

    def wait_s(self, now_s: float) -> float:
        """Until it has computed what was sent to it from here. Of the first, it may have done nearly all by now."""
        if not self.outstanding_prefills:
            return 0.0
        first_s = self.outstanding_s / self.outstanding_prefills
        return max(0.0, self.outstanding_s - min(now_s - self.working_since_s, first_s))

    def state(self) -> WorkerState | str:
        """starting, ready, draining, lost, hung or suspect."""
        if self.lost:
            return "lost"
        if self.registration.state != "starting" and self.hung:
            return "hung"
        if self.registration.state == "ready" and self.health.condition is Condition.SUSPECT:
            return "suspect"
        return self.registration.state


@dataclass(slots=True)
class Ticket:
    """What one request weighs on its workers; each weight is taken off once."""

    prefill: Worker
    decode: Worker
    uncached_tokens: int
    prompt_tokens: int
    prefill_s: float
    """What its prefill was expected to take."""
    reserved_tokens: int = 0
    prefilling: bool = True
    decoding: bool = True


class Fleet:
    """All workers by name. Time is in seconds of any steady clock, the same in every call.

    hung_s  an engine that has not moved for longer gets nothing
    """

    def __init__(self, hung_s: float = math.inf) -> None:
        self.all_known_at_s = -math.inf
        """Until then there may be workers that have not said a word here yet."""
        self._hung_s = hung_s
        self._workers: dict[str, Worker] = {}
        self._by_name: list[Worker] = []
        """The same workers, sorted."""
        self._left: dict[str, tuple[int, float]] = {}
        """By name, the last epoch that said goodbye and when, the latest goodbye last."""

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def __contains__(self, name: str) -> bool:
        return name in self._workers

    def __getitem__(self, name: str) -> Worker:
        return self._workers[name]

    def get(self, name: str) -> Worker | None:
        return self._workers.get(name)

    def register(self, registration: Registration, now_s: float) -> Change:
        """Takes in a registration. A newer epoch replaces the worker; an older one is not listened to.

        Nor is one that has left: a renewal that was on its way may come after the goodbye.
        """
        known = self._workers.get(registration.worker)
        if known is not None and registration.epoch < known.registration.epoch:
            return Change.STALE
        left_epoch, _ = self._left.get(registration.worker, (-1, 0.0))
        if registration.leaving:
            self._take_out(registration.worker)
            self._note_left(registration.worker, max(registration.epoch, left_epoch), now_s)
            return Change.LEFT
        if registration.epoch <= left_epoch:
            return Change.STALE
        if known is None or registration.epoch > known.registration.epoch:
            worker = Worker(registration, now_s)
            if known is not None:
                worker.requests, worker.recent = known.requests, known.recent
            self._workers[registration.worker] = worker
            self._by_name = [self._workers[name] for name in sorted(self._workers)]
            return Change.NEW if known is None else Change.REPLACED
        known.registration, known.seen_s = registration, now_s
        known.hung = registration.load.silent_s > self._hung_s
        if known.lost:
            known.lost = False
            return Change.BACK
        return Change.RENEWED

    def _take_out(self, name: str) -> None:
        worker = self._workers.pop(name, None)
        if worker is not None:
            self._by_name.remove(worker)

    def _note_left(self, name: str, epoch: int, now_s: float) -> None:
        self._left.pop(name, None)
        self._left[name] = epoch, now_s
        if len(self._left) > MAX_LEFT:
            del self._left[next(iter(self._left))]

    def expire(self, now_s: float) -> list[str]:
        """Names of workers whose lease ran out since the last call; those lost long ago are dropped."""
        lost = []
        for worker in list(self._workers.values()):
            silent_s = now_s - worker.seen_s
            if not worker.lost and silent_s > worker.registration.lease_s:
                worker.lost, worker.mode = True, FeedMode.LOAD_ONLY
                lost.append(worker.name)
            elif worker.lost and silent_s > worker.registration.lease_s + FORGET_S:
                self._take_out(worker.name)
        self._left = {name: left for name, left in self._left.items() if now_s - left[1] <= FORGET_S}
        return lost

    def suspect(self, name: str, now_s: float) -> None:
        """Notes that a request failed there."""
        if name in self._workers:
            self._workers[name].health.failed(now_s)

    def candidates(self) -> tuple[list[Worker], list[Worker]]:
        """`ready` without suspects, unless nobody else can prefill, or decode."""
        prefills, decodes = self.ready()
        return _unsuspected(prefills), _unsuspected(decodes)

    def may_come(self, now_s: float) -> bool:
        """Whether there may soon be a worker that gets nothing now: one that is not well, or not known yet."""
        return now_s < self.all_known_at_s or any(
            worker.lost
            or worker.hung
            or worker.registration.state != "ready"
            or worker.health.condition is Condition.SUSPECT
            for worker in self
        )

    def any_pair(self) -> bool:
        """Whether there is anybody to prefill, and anybody to decode."""
        prefills, decodes = self.ready()
        return bool(prefills and decodes)

    def to_probe(self, now_s: float) -> list[Worker]:
        """Workers whose time to be probed has come."""
        return [worker for worker in self if not worker.lost and worker.health.probe_at_s <= now_s]

    def ready(self) -> tuple[list[Worker], list[Worker]]:
        """Workers that take requests, by name: those that prefill, and those that decode."""
        prefills: list[Worker] = []
        decodes: list[Worker] = []
        for worker in self._by_name:
            registration = worker.registration
            if worker.lost or worker.hung or registration.state != "ready":
                continue
            if registration.role != "decode":
                prefills.append(worker)
            if registration.role != "prefill":
                decodes.append(worker)
        return prefills, decodes

    def in_flight(self) -> dict[str, WorkerLoad]:
        """By worker, what was sent from here and is not over: what other routers are told."""
        return {
            worker.name: WorkerLoad(
                epoch=worker.registration.epoch,
                outstanding_tokens=worker.outstanding_uncached_tokens,
                outstanding_requests=worker.outstanding_prefills,
                outstanding_s=worker.outstanding_s,
                inflight_requests=worker.inflight_requests,
                inflight_tokens=worker.inflight_tokens,
            )
            for worker in self
            if worker.inflight_requests or worker.outstanding_prefills
        }

    def dispatch(
        self,
        prefill: str,
        decode: str,
        prompt_tokens: int,
        uncached_tokens: int,
        prefill_s: float,
        now_s: float,
        reserved_tokens: int = 0,
    ) -> Ticket:
        """Counts a request on the workers that it is sent to now.

        prefill_s        what its prefill is expected to take
        reserved_tokens  KV slots that it is expected to take where it decodes
        """
        ticket = Ticket(
            self._workers[prefill], self._workers[decode], uncached_tokens, prompt_tokens, prefill_s, reserved_tokens
        )
        first, second = ticket.prefill, ticket.decode
        if not first.outstanding_prefills:
            first.working_since_s = now_s
        first.outstanding_s += prefill_s
        first.outstanding_uncached_tokens += uncached_tokens
        first.outstanding_prefills += 1
        first.recent.add(uncached_tokens, now_s)
        second.inflight_tokens += prompt_tokens
        second.reserved_tokens += reserved_tokens
        second.recent.add(prompt_tokens, now_s)
        for worker in {id(first): first, id(second): second}.values():
            worker.inflight_requests += 1
            worker.requests += 1
            worker.health.sent()
        return ticket

    def prefilled(self, ticket: Ticket, now_s: float) -> None:
        """The prefill worker is done with it. Calling it again changes nothing."""
        if not ticket.prefilling:
            return
        ticket.prefilling = False
        ticket.prefill.outstanding_s -= ticket.prefill_s
        ticket.prefill.working_since_s = now_s
        ticket.prefill.outstanding_uncached_tokens -= ticket.uncached_tokens
        ticket.prefill.outstanding_prefills -= 1
        if not ticket.prefill.outstanding_prefills:
            # No rounding error outlives a busy spell.
            ticket.prefill.outstanding_s = 0.0
        if ticket.prefill is not ticket.decode:
            ticket.prefill.inflight_requests -= 1

    def finished(self, ticket: Ticket, now_s: float) -> None:
        """The request is over, on both workers, however it ended. Calling it again changes nothing."""
        self.prefilled(ticket, now_s)
        if not ticket.decoding:
            return
        ticket.decoding = False
        ticket.decode.inflight_tokens -= ticket.prompt_tokens
        ticket.decode.reserved_tokens -= ticket.reserved_tokens
        ticket.decode.inflight_requests -= 1
        for worker in {id(ticket.prefill): ticket.prefill, id(ticket.decode): ticket.decode}.values():
            worker.health.ended()


def _unsuspected(workers: list[Worker]) -> list[Worker]:
    return [worker for worker in workers if worker.health.offered] or workers
