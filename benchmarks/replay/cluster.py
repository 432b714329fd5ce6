"""Replay over simulated workers: the product's own router in virtual time, in one process, without sockets.

    Trace ──arrivals──> VirtualRouter (fleet, index, cost model, policy) ──jobs──> SimWorker …
                            ^            first tokens, ends                          │
                            └──────────── page events (`feed`) ──────────────────────┘

A worker that does both parts gets a whole request. Of a pair, decode takes room first, then prefill
computes, and the hand-off ends with the delivery: as the real pair does. Of several routers, each
gets the next request in turn.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count, groupby

from benchmarks.replay.feed import AUDIT_S, RENEW_S, Feed, Lost, Source
from benchmarks.replay.objective import Objective
from benchmarks.replay.outcome import Outcome
from benchmarks.replay.scenario import Scenario
from benchmarks.replay.virtual_router import VirtualRouter
from benchmarks.traces.trace import Session, Trace, Turn
from engine.journal import Journal
from engine.sim import Aborted, Allocated, Finished, FirstToken, Prefilled, Refused, SimEvent, SimJob, SimWorker
from engine.sim_job import Part
from router.config import RouterSection
from router.decision import Decision
from router.follower import TICK_S
from router.gossip import CHANGED_S
from router.pair_cost import PairCost
from router.placement import Flight
from transfer.wire import Published

ORACLE = "oracle"
"""Our cost, with what every worker holds at that very moment: no event is under way and none was lost."""
FOUND_S = -1.0
"""When the workers are first heard of: their feeds are known when the first request comes."""
AGAIN_S = 0.5
"""A client whose request failed before its first token sends it again after this long."""

Watch = Callable[[VirtualRouter, Session, Turn, Decision, float], None]
"""Told who chose what for which request and when, before the request is sent."""


@dataclass(slots=True)
class _Request:
    turn: Turn
    session: Session
    arrived_s: float
    router: VirtualRouter
    flight: Flight
    prefill: SimWorker
    decode: SimWorker
    answered: Callable[[float], None]
    cached_tokens: int = 0
    first_s: float | None = None


def _none_lost(feed: Feed, message: Published, now_s: float) -> bool:
    return False


def _unwatched(router: VirtualRouter, session: Session, turn: Turn, decision: Decision, now_s: float) -> None:
    pass


class Cluster:
    """One policy over one fleet, from the first request to the last.

    routers  that get the requests in turn
    gossip   whether they tell each other what they have in flight
    lost     whether what a worker publishes does not arrive at a router
    watch    sees every choice
    """

    def __init__(
        self,
        scenario: Scenario,
        policy: str,
        *,
        routers: int = 1,
        gossip: bool = True,
        lost: Lost = _none_lost,
        watch: Watch = _unwatched,
        learn: bool | None = None,
    ) -> None:
        """learn  whether it is learned how long things take; None: where the policy counts seconds"""
        live = PairCost.name if policy == ORACLE else policy
        # The others count no seconds: learning how long things take would cost a tenth of a replay, and change nothing.
        learns = live == PairCost.name if learn is None else learn
        cost = scenario.cost.model_copy(update={"learn": learns})
        section = RouterSection.model_validate({"policy": live, "cost": cost, "seed": scenario.seed})
        self.workers = {name: SimWorker(name, config, epoch=1) for name, config in scenario.configs()}
        self.sources = {name: Source(worker, Journal(name, 1)) for name, worker in self.workers.items()}
        self.outcome = Outcome([name for name, worker in self.workers.items() if worker.config.role != "decode"])
        self._page_tokens = scenario.page_tokens
        self._omniscient = policy == ORACLE
        self._watch = watch
        self._order = count()
        self._due: list[tuple[float, int, Callable[[float], None]]] = []
        self._wakes: dict[str, float] = {}
        self._down: set[str] = set()
        self._rids = count()
        self._requests: dict[int, _Request] = {}
        self._left = 0
        """Requests of the trace that are not over."""
        self._objective: Objective | None = None
        self._tell: Callable[[int], None] | None = None
        self.routers = [VirtualRouter(f"router-{number}", section, self.later, lost) for number in range(routers)]
        for router in self.routers:
            for source in self.sources.values():
                router.registered(source, 0.0, FOUND_S)
        if gossip and routers > 1:
            for number, router in enumerate(self.routers):
                self._every(CHANGED_S, partial(self._gossip, router), CHANGED_S * number / routers)

    def open_loop(
        self, trace: Trace, rate: float, objective: Objective | None = None, tell: Callable[[int], None] | None = None
    ) -> Outcome:
        """Requests by their times, `rate` times as fast."""
        self._objective, self._tell, self._left = objective, tell, trace.requests
        for at_s, arrivals in groupby(trace.arrivals(), key=lambda arrival: arrival[0]):
            self._run_to(at_s / rate)
            if self._missed:
                break
            for _, session, turn in arrivals:
                self._send(session, turn, at_s / rate, at_s / rate, lambda at_s: None)
        return self._finish()

    def closed_loop(
        self, trace: Trace, lanes: int, objective: Objective | None = None, tell: Callable[[int], None] | None = None
    ) -> Outcome:
        """`lanes` sessions at a time, each turn after the answer before it and its think time."""
        self._objective, self._tell, self._left = objective, tell, trace.requests
        waiting = iter(trace.sessions)

        def begin(now_s: float) -> None:
            session = next(waiting, None)
            if session is not None:
                ask(session, 0, now_s)

        def ask(session: Session, place: int, now_s: float) -> None:
            def answered(at_s: float) -> None:
                if place + 1 == len(session.turns):
                    self.later(at_s, begin)
                else:
                    think_s = session.turns[place + 1].think_s
                    self.later(at_s + think_s, lambda later_s: ask(session, place + 1, later_s))

            self._send(session, session.turns[place], now_s, now_s, answered)

        for _ in range(lanes):
            self.later(0.0, begin)
        return self._finish()

    def later(self, at_s: float, act: Callable[[float], None]) -> None:
        """Calls `act` with the time, at that time."""
        heapq.heappush(self._due, (at_s, next(self._order), act))

    def keep_in_touch(self) -> None:
        """From now on agents register and audit again and again, and routers look at the time.

        To be called before the replay. Without it, as long as nothing is lost, nobody would notice a difference.
        """
        for number, name in enumerate(self.workers):
            share = number / len(self.workers)
            self._every(RENEW_S, partial(self._renew, name), RENEW_S * share)
            self._every(AUDIT_S, partial(self._audit, name), AUDIT_S * share)
        for router in self.routers:
            self._every(TICK_S, router.tick, 0.0)

    def restart(self, name: str, down_s: float, now_s: float) -> None:
        """The worker and its agent die at once and are back after so long, with nothing in the cache."""
        worker = self.workers[name]
        self._look(worker, now_s)
        self.sources[name].answers = False
        self._down.add(name)
        worker.restart(worker.epoch + 1, now_s)
        self._look(worker, now_s)
        self.later(now_s + down_s, lambda at_s: self._back(name, at_s))

    def _back(self, name: str, now_s: float) -> None:
        worker = self.workers[name]
        self._down.remove(name)
        self.sources[name] = Source(worker, Journal(name, worker.epoch))
        self._renew(name, now_s)

    def _renew(self, name: str, now_s: float) -> None:
        if name not in self._down:
            for router in self.routers:
                router.registered(self.sources[name], AUDIT_S, now_s)

    def _audit(self, name: str, now_s: float) -> None:
        if name not in self._down:
            self.sources[name].audit(now_s)

    def _gossip(self, router: VirtualRouter, now_s: float) -> None:
        router.talk([other for other in self.routers if other is not router], now_s)

    def _every(self, period_s: float, act: Callable[[float], None], first_s: float) -> None:
        """Again and again, as long as requests are left."""

        def turn(now_s: float) -> None:
            act(now_s)
            if self._left:
                self.later(now_s + period_s, turn)

        self.later(first_s, turn)

    @property
    def _missed(self) -> bool:
        return self._objective is not None and self._objective.missed

    def _finish(self) -> Outcome:
        self._run_to(float("inf"))
        self.outcome.cut = self._missed
        return self.outcome

    def _run_to(self, until_s: float) -> None:
        while self._due and self._due[0][0] <= until_s and not self._missed:
            at_s, _, act = heapq.heappop(self._due)
            act(at_s)

    def _send(
        self, session: Session, turn: Turn, arrived_s: float, now_s: float, answered: Callable[[float], None]
    ) -> None:
        rid = next(self._rids)
        router = self.routers[rid % len(self.routers)]
        held = {name: worker.held(turn.ids) for name, worker in self.workers.items()} if self._omniscient else None
        decision = router.choose(turn, session.id, self._page_tokens, now_s, held)
        self._watch(router, session, turn, decision, now_s)
        flight = router.placement.send(decision, turn.ids, now_s)
        prefill, decode = self.workers[decision.prefill], self.workers[decision.decode]
        request = _Request(turn, session, arrived_s, router, flight, prefill, decode, answered)
        if self._down:
            dead = {prefill.name, decode.name} & self._down
            if dead:
                self._unreachable(request, dead, now_s)
                return
        self._requests[rid] = request
        decode.submit(_job(rid, turn, "whole" if prefill is decode else "decode"), now_s)
        # Not now: requests of the same moment are batched, and others may be on their way in.
        self.later(now_s, lambda at_s: self._look(decode, at_s))

    def _unreachable(self, request: _Request, dead: set[str], now_s: float) -> None:
        for name in sorted(dead):
            request.router.fleet.suspect(name, now_s)
        request.router.placement.ended(request.flight, now_s)
        self._send_again(request, now_s)

    def _send_again(self, request: _Request, now_s: float) -> None:
        self.later(
            now_s + AGAIN_S,
            lambda at_s: self._send(request.session, request.turn, request.arrived_s, at_s, request.answered),
        )

    def _look(self, worker: SimWorker, now_s: float) -> None:
        """Takes what has happened in a worker, and comes again when something will."""
        for event in worker.advance(now_s):
            self._happened(worker, event, now_s)
        self.sources[worker.name].publish(now_s)
        next_s = max(now_s, worker.next_event_s)
        if next_s != self._wakes.get(worker.name) and next_s < float("inf"):
            self._wakes[worker.name] = next_s
            self.later(next_s, lambda at_s: self._wake(worker, at_s))

    def _wake(self, worker: SimWorker, at_s: float) -> None:
        if self._wakes.get(worker.name) == at_s:
            del self._wakes[worker.name]
            self._look(worker, at_s)

    def _happened(self, worker: SimWorker, event: SimEvent, now_s: float) -> None:
        request = self._requests.get(event.rid)
        if request is None:
            return
        both = request.prefill is request.decode
        placement = request.router.placement
        match event:
            case Prefilled(_, at_s, cached_tokens):
                request.cached_tokens = cached_tokens
                if both:
                    placement.prefilled(request.flight, at_s, cached_tokens)
            case Allocated(rid, at_s, held_pages):
                if request.prefill.name in self._down:
                    self._failed(rid, request, worker, now_s)
                    return
                request.prefill.submit(_job(rid, request.turn, "prefill", held_pages), at_s)
                self.later(at_s, lambda now_s: self._look(request.prefill, now_s))
            case FirstToken(_, at_s):
                self._first_token(request, at_s)
            case Finished(rid, at_s) if worker is not request.decode:
                placement.prefilled(request.flight, at_s, request.cached_tokens)
                request.decode.delivered(rid, at_s)
                self.later(at_s, lambda now_s: self._look(request.decode, now_s))
            case Finished(rid, at_s):
                self._over(rid, request, at_s, well=True)
            case Refused(rid, at_s, _):
                self._abort_other(rid, request, worker, at_s)
                self._over(rid, request, at_s, well=False)
            case Aborted(rid, _, _):
                self._failed(rid, request, worker, now_s)

    def _failed(self, rid: int, request: _Request, worker: SimWorker, now_s: float) -> None:
        """A worker died with it. It is sent again, unless its client has seen a part of the answer."""
        for name in {request.prefill.name, request.decode.name} & self._down:
            request.router.fleet.suspect(name, now_s)
        self._abort_other(rid, request, worker, now_s)
        if request.first_s is not None:
            self._over(rid, request, now_s, well=False)
            return
        del self._requests[rid]
        request.router.placement.ended(request.flight, now_s)
        self._send_again(request, now_s)

    def _abort_other(self, rid: int, request: _Request, worker: SimWorker, now_s: float) -> None:
        """Of a pair, the part that goes on ends too."""
        other = request.decode if worker is request.prefill else request.prefill
        if other is not worker:
            other.abort(rid, now_s)
            self.later(now_s, lambda at_s: self._look(other, at_s))

    def _first_token(self, request: _Request, at_s: float) -> None:
        if request.first_s is not None:
            return
        request.first_s = at_s
        turn = request.turn
        self.outcome.first_token(
            request.prefill.name, request.arrived_s, at_s, turn.prompt_tokens, request.cached_tokens
        )
        if self._objective is not None:
            self._objective.first_token(at_s - request.arrived_s)
        if self._tell is not None:
            self._tell(len(self.outcome.ttft_s))

    def _over(self, rid: int, request: _Request, at_s: float, well: bool) -> None:
        del self._requests[rid]
        self._left -= 1
        self.outcome.refused += not well
        tokens = request.turn.output_tokens
        itl_s = None if request.first_s is None or tokens < 2 else (at_s - request.first_s) / (tokens - 1)
        request.router.placement.ended(request.flight, at_s, itl_s if well else None, tokens)
        if request.first_s is None and self._objective is not None:
            # It has no first token, and that is later than any objective.
            self._objective.first_token(float("inf"))
        request.answered(at_s)


def _job(rid: int, turn: Turn, part: Part, decode_held_pages: int = 0) -> SimJob:
    return SimJob(
        rid=rid,
        ids=turn.ids,
        prompt_tokens=turn.prompt_tokens,
        output_tokens=max(1, turn.output_tokens),
        part=part,
        decode_held_pages=decode_held_pages,
    )
