"""Replay on paper: each worker is a prefix cache and one prefill at a time (`router.paper_fleet`).

Knowledge is exact and immediate, for every policy. It is the plainest model in which routing
matters, and one in which baselines can be checked against what others found with it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from benchmarks.replay.objective import Objective
from benchmarks.replay.outcome import Outcome
from benchmarks.replay.scenario import TOKEN_S, Scenario
from benchmarks.traces.trace import Session, Trace, Turn
from router.cost import CostModel
from router.paper_fleet import PaperFleet
from router.policy import Ask, Policy


class PaperReplay:
    """One policy over one fleet."""

    def __init__(self, scenario: Scenario, policy: Policy) -> None:
        frozen = scenario.cost.model_copy(update={"learn": False})
        self._fleet = PaperFleet(policy, CostModel(frozen))
        self._capacities = {f"worker-{number}": scenario.capacity_tokens for number in range(scenario.workers)}
        self.outcome = Outcome(list(self._capacities))

    def open_loop(
        self, trace: Trace, rate: float, objective: Objective | None = None, tell: Callable[[int], None] | None = None
    ) -> Outcome:
        """Requests by their times, `rate` times as fast."""
        for number, (at_s, session, turn) in enumerate(trace.arrivals()):
            self._send(trace, session, turn, at_s / rate, objective)
            if tell is not None:
                tell(number + 1)
            if objective is not None and objective.missed:
                self.outcome.cut = True
                break
        return self.outcome

    def closed_loop(
        self, trace: Trace, lanes: int, objective: Objective | None = None, tell: Callable[[int], None] | None = None
    ) -> Outcome:
        """`lanes` sessions at a time, each turn after the answer before it and its think time."""
        waiting = iter(trace.sessions)
        due: list[tuple[float, int, Session, int]] = []
        for lane in range(lanes):
            if (session := next(waiting, None)) is not None:
                heapq.heappush(due, (0.0, lane, session, 0))
        done = 0
        while due:
            now_s, lane, session, place = heapq.heappop(due)
            turn = session.turns[place]
            first_s = self._send(trace, session, turn, now_s, objective)
            done += 1
            if tell is not None:
                tell(done)
            if objective is not None and objective.missed:
                self.outcome.cut = True
                break
            answered_s = first_s + turn.output_tokens * TOKEN_S
            if place + 1 < len(session.turns):
                think_s = session.turns[place + 1].think_s
                heapq.heappush(due, (answered_s + think_s, lane, session, place + 1))
            elif (following := next(waiting, None)) is not None:
                heapq.heappush(due, (answered_s, lane, following, 0))
        return self.outcome

    def _send(self, trace: Trace, session: Session, turn: Turn, now_s: float, objective: Objective | None) -> float:
        ask = Ask(
            number=turn.number,
            prompt_tokens=turn.prompt_tokens,
            page_tokens=trace.page_tokens,
            ids=turn.ids,
            session=session.id,
            now_s=now_s,
        )
        placed = self._fleet.place(ask, self._capacities)
        self.outcome.first_token(placed.worker, now_s, placed.ends_s, turn.prompt_tokens, placed.cached_tokens)
        if objective is not None:
            objective.first_token(placed.ends_s - now_s)
        return placed.ends_s
