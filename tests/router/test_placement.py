"""A choice changes what the next one sees, and what became of it corrects what is expected."""

from __future__ import annotations

import msgspec
import pytest

from router.config import CostConfig, RouterSection
from router.expected import GRACE_S
from router.fleet import FeedMode, Fleet
from router.gossip import Elsewhere
from router.placement import Flight, Placement
from tests.router.registrations import registration

IDS = tuple(range(100, 160))
TOKENS = 16 * len(IDS)
COST = CostConfig(prefill_overhead_s=0.05, prefill_tokens_per_s=1000, context_halving_tokens=1e12)


class Router:
    """A placement and its fleet, without sockets."""

    def __init__(self, *names: str) -> None:
        self.fleet = Fleet()
        for name in (*names, "d0"):
            self.fleet.register(registration(name, "decode" if name == "d0" else "prefill"), 0)
            self.fleet[name].mode = FeedMode.EXACT
        self.placement = Placement(RouterSection(cost=COST), self.fleet)

    def send(self, now_s: float, ids: tuple[int, ...] = IDS) -> Flight:
        prefills, decodes = self.fleet.candidates()
        tokens = 16 * len(ids)
        decision = self.placement.choose(prefills, decodes, {}, ids, tokens, 16, "", now_s)
        return self.placement.send(decision, ids, now_s)


def test_load_is_counted_when_sent_and_taken_off_once() -> None:
    router = Router("p0")
    flight = router.send(0)
    p0, d0 = router.fleet["p0"], router.fleet["d0"]
    assert (p0.outstanding_uncached_tokens, p0.outstanding_prefills, d0.inflight_tokens) == (TOKENS, 1, TOKENS)
    assert p0.wait_s(0) == pytest.approx(0.05 + TOKENS / 1000)

    for _ in range(2):
        router.placement.prefilled(flight, 1)
        router.placement.failed(flight, 1)
    assert (p0.outstanding_uncached_tokens, p0.outstanding_prefills, p0.wait_s(1)) == (0, 0, 0)
    assert d0.inflight_requests == 1
    for _ in range(2):
        router.placement.ended(flight, 2)
    assert (d0.inflight_tokens, d0.inflight_requests, p0.inflight_requests) == (0, 0, 0)
    assert router.placement.model.observed_prefills == 1


def test_siblings_of_a_burst_go_where_the_first_one_went_although_no_event_came() -> None:
    router = Router("p0", "p1", "p2")
    first = router.send(0)
    second = router.send(0.01, (*IDS[:50], 7, 8))

    assert second.decision.prefill == first.decision.prefill
    assert second.decision.matched_tokens == 16 * 50
    assert router.send(0.02, tuple(range(900, 960))).decision.prefill != first.decision.prefill


def test_what_never_came_is_not_expected_after_its_grace() -> None:
    router = Router("p0")
    router.placement.prefilled(router.send(0), 1)

    assert router.send(1 + 0.5 * GRACE_S).decision.matched_tokens > 0
    late = Router("p0")
    late.placement.prefilled(late.send(0), 1)
    assert late.send(1 + GRACE_S).decision.matched_tokens == 0


def test_an_abort_is_no_observation_and_nothing_is_expected_of_it() -> None:
    router = Router("p0")
    router.placement.ended(router.send(0), 0.001)

    assert router.placement.model.observed_prefills == 0
    assert len(router.placement.expected) == 0
    assert router.send(0.002).decision.matched_tokens == 0


def test_an_abort_in_the_queue_does_not_shorten_what_the_first_one_took() -> None:
    router = Router("p0")
    first = router.send(0)
    router.placement.ended(router.send(0.1, tuple(range(900, 960))), 0.9)
    router.placement.prefilled(first, 1.0)
    assert router.placement.model.observed_prefills == 0

    router.placement.prefilled(router.send(5, tuple(range(700, 760))), 6)
    assert router.placement.model.observed_prefills == 1


def test_the_model_learns_from_flights_what_the_engine_had_to_compute() -> None:
    router = Router("p0")
    for turn in range(64):
        start = 1000 * (turn + 1)
        flight = router.send(10 * turn, tuple(range(start, start + 10 + turn)))
        uncached = 16 * (10 + turn) - 80
        router.placement.prefilled(flight, 10 * turn + uncached / 500, cached_tokens=80)
        router.placement.ended(flight, 10 * turn + 5)

    assert router.placement.model.prefill_s("p0", 500, 500) == pytest.approx(1.0, rel=0.1)


def test_a_lost_worker_leaves_nothing_behind() -> None:
    router = Router("p0")
    flight = router.send(0)
    router.placement.lost("p0")
    assert router.send(0.1).decision.matched_tokens == 0

    router.placement.ended(flight, 0.2)
    assert router.send(0.3).decision.matched_tokens > 0  # of the second, which is in flight


def test_a_prefill_of_an_ended_life_teaches_nothing_of_the_next_one() -> None:
    router = Router("p0")
    late = router.send(0)
    router.fleet.register(msgspec.structs.replace(registration("p0", "prefill"), epoch=2), 1)
    router.placement.lost("p0")
    router.placement.prefilled(late, 50)
    assert router.placement.model.observed_prefills == 0

    router.placement.prefilled(router.send(60), 61)
    assert router.placement.model.observed_prefills == 1


def test_a_guessed_length_teaches_nothing_and_its_load_is_taken_off() -> None:
    router = Router("p0")
    decision = router.placement.choose(*router.fleet.candidates(), {}, (), 250_000, 16, "", 0, guessed=True)
    flight = router.placement.send(decision, (), 0)
    router.placement.prefilled(flight, 0.4, cached_tokens=0)

    assert router.fleet["p0"].outstanding_prefills == 0
    assert router.placement.model.observed_prefills == 0


def test_pages_that_are_not_sure_weigh_half_as_load_too() -> None:
    router = Router("p0")
    router.fleet["p0"].mode = FeedMode.APPROXIMATE
    decision = router.placement.choose(*router.fleet.candidates(), {"p0": 60}, IDS, TOKENS + 1, 16, "", 0)

    assert decision.matched_tokens == TOKENS
    assert decision.uncached_tokens == 1 + TOKENS // 2


def test_of_time_that_several_routers_used_each_learns_its_share() -> None:
    router = Router("p0")
    flight = router.send(0)
    router.fleet["p0"].elsewhere = Elsewhere(outstanding_requests=3, outstanding_s=3 * flight.ticket.prefill_s)
    router.placement.prefilled(flight, 4 * flight.ticket.prefill_s)

    expected_s = router.placement.model.prefill_s("p0", TOKENS, TOKENS)
    assert expected_s == pytest.approx(flight.ticket.prefill_s, rel=0.01)
