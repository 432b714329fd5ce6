"""Workers come, go, are counted and are avoided."""

from __future__ import annotations

import msgspec
import pytest

from router.fleet import FORGET_S, MAX_LEFT, RECENT_HALF_LIFE_S, Change, Fleet
from tests.router.registrations import registration
from transfer.wire import Load


@pytest.fixture
def fleet() -> Fleet:
    fleet = Fleet()
    for name in ("p0", "p1"):
        fleet.register(registration(name), 0)
    fleet.register(registration("d0", "decode"), 0)
    return fleet


def names(fleet: Fleet, now_s: float) -> list[str]:
    return [worker.name for worker in fleet.candidates()[0]]


def test_a_worker_whose_lease_ran_out_is_lost_once_and_comes_back_with_the_next_renewal(fleet: Fleet) -> None:
    fleet.register(registration("p1"), 4)
    fleet.register(registration("d0", "decode"), 4)

    assert fleet.expire(5.1) == ["p0"]
    assert fleet.expire(5.2) == []
    assert names(fleet, 5.2) == ["p1"]
    assert fleet["p0"].state() == "lost"
    assert fleet.register(registration("p0"), 6) is Change.BACK
    assert names(fleet, 6) == ["p0", "p1"]


def test_a_worker_that_was_lost_long_ago_is_dropped(fleet: Fleet) -> None:
    fleet.expire(6)
    fleet.expire(5 + FORGET_S + 1)

    assert "p0" not in fleet


def test_a_new_epoch_starts_with_no_load_and_an_old_one_is_not_listened_to(fleet: Fleet) -> None:
    fleet.dispatch("p0", "d0", 100, 100, 0.5, 0)

    assert fleet.register(registration("p0", epoch=2), 1) is Change.REPLACED
    assert fleet["p0"].outstanding_uncached_tokens == 0
    assert fleet.register(registration("p0", epoch=1), 2) is Change.STALE
    assert fleet["p0"].registration.epoch == 2


def test_a_request_of_an_earlier_epoch_takes_nothing_off_the_new_one(fleet: Fleet) -> None:
    ticket = fleet.dispatch("p0", "d0", 100, 100, 0.5, 0)
    fleet.register(registration("p0", epoch=2), 1)

    fleet.finished(ticket, 1)

    assert fleet["p0"].outstanding_uncached_tokens == 0
    assert fleet["d0"].inflight_requests == 0


def test_a_leaving_worker_is_gone_at_once(fleet: Fleet) -> None:
    leaving = msgspec.structs.replace(registration("p0"), leaving=True)

    assert fleet.register(leaving, 1) is Change.LEFT
    assert names(fleet, 1) == ["p1"]


def test_a_renewal_that_comes_after_the_goodbye_does_not_bring_the_epoch_back(fleet: Fleet) -> None:
    fleet.register(msgspec.structs.replace(registration("p0", epoch=2), leaving=True), 1)

    assert fleet.register(registration("p0", epoch=2), 1.1) is Change.STALE
    assert fleet.register(registration("p0", epoch=1), 1.2) is Change.STALE
    fleet.expire(2)
    assert fleet.register(registration("p0", epoch=2), 2.1) is Change.STALE
    assert names(fleet, 3) == ["p1"]
    assert fleet.register(registration("p0", epoch=3), 3) is Change.NEW
    assert names(fleet, 3) == ["p0", "p1"]


def test_goodbyes_are_forgotten_after_a_while_and_beyond_a_number() -> None:
    fleet = Fleet()
    for number in range(MAX_LEFT + 1):
        fleet.register(msgspec.structs.replace(registration(f"p{number}"), leaving=True), 1)

    assert fleet.register(registration("p0"), 2) is Change.NEW  # the earliest of too many
    assert fleet.register(registration("p1"), 2) is Change.STALE
    fleet.expire(1 + FORGET_S + 1)
    assert fleet.register(registration("p1"), 3 + FORGET_S) is Change.NEW


def test_those_that_are_ready_are_suspects_too(fleet: Fleet) -> None:
    fleet.suspect("p0", 1)

    prefills, decodes = fleet.ready()
    assert [worker.name for worker in prefills] == ["p0", "p1"]
    assert [worker.name for worker in decodes] == ["d0"]


def test_a_suspect_is_avoided_until_it_answers_a_probe_but_taken_where_it_is_the_only_one(fleet: Fleet) -> None:
    fleet.suspect("p0", 1)
    assert names(fleet, 2) == ["p1"]
    assert fleet["p0"].state() == "suspect"
    assert fleet.to_probe(1) == [fleet["p0"]]
    assert fleet.may_come(1)

    fleet.suspect("p1", 1)
    assert names(fleet, 2) == ["p0", "p1"]

    fleet["p0"].health.probed(True, 2)
    assert names(fleet, 2) == ["p0"]
    ticket = fleet.dispatch("p0", "d0", prompt_tokens=100, uncached_tokens=60, prefill_s=0.5, now_s=0)
    fleet["p1"].health.probed(True, 2)
    assert names(fleet, 2) == ["p1"]  # p0 has its trial
    fleet.finished(ticket, 3)
    assert names(fleet, 3) == ["p0", "p1"]


def test_a_worker_whose_engine_does_not_move_gets_nothing_until_it_does(fleet: Fleet) -> None:
    fleet = Fleet(hung_s=10)
    fleet.register(registration("p0"), 0)
    for silent_s, found in ((9.0, ["p0"]), (11.0, []), (0.2, ["p0"])):
        fleet.register(msgspec.structs.replace(registration("p0"), load=Load(silent_s=silent_s)), 1)
        assert names(fleet, 1) == found
    assert not fleet.may_come(1)


def test_who_has_just_begun_does_not_know_yet_who_is_there() -> None:
    fleet = Fleet()
    fleet.all_known_at_s = 3

    assert fleet.may_come(2.9)
    assert not fleet.may_come(3)


def test_load_is_counted_at_dispatch_and_taken_off_once(fleet: Fleet) -> None:
    ticket = fleet.dispatch("p0", "d0", prompt_tokens=100, uncached_tokens=60, prefill_s=0.5, now_s=0)

    assert fleet["p0"].outstanding_uncached_tokens == 60
    assert fleet["p0"].inflight_requests == fleet["d0"].inflight_requests == 1
    assert fleet["d0"].inflight_tokens == 100

    fleet.prefilled(ticket, 1)
    fleet.prefilled(ticket, 1)
    assert fleet["p0"].outstanding_uncached_tokens == fleet["p0"].inflight_requests == 0
    assert fleet["d0"].inflight_requests == 1

    fleet.finished(ticket, 1)
    fleet.finished(ticket, 1)
    assert fleet["d0"].inflight_requests == fleet["d0"].inflight_tokens == 0
    assert fleet["p0"].requests == 1


def test_a_worker_that_does_both_counts_a_request_once(fleet: Fleet) -> None:
    fleet.register(registration("m0", "both"), 0)
    ticket = fleet.dispatch("m0", "m0", 10, 10, 0.1, 0)

    assert fleet["m0"].inflight_requests == fleet["m0"].requests == 1
    fleet.prefilled(ticket, 1)
    assert fleet["m0"].inflight_requests == 1
    fleet.finished(ticket, 1)
    assert fleet["m0"].inflight_requests == 0


def test_a_worker_is_waited_for_as_long_as_what_it_was_sent_takes(fleet: Fleet) -> None:
    first = fleet.dispatch("p0", "d0", 100, 100, prefill_s=2.0, now_s=10)
    second = fleet.dispatch("p0", "d0", 100, 100, prefill_s=2.0, now_s=11)

    assert fleet["p0"].wait_s(11) == pytest.approx(3)
    assert fleet["p0"].wait_s(19) == pytest.approx(2)  # the first is late; it is not believed to have done the second's
    fleet.prefilled(first, 12)
    assert fleet["p0"].wait_s(13) == pytest.approx(1)
    fleet.finished(second, 14)
    assert fleet["p0"].wait_s(14) == 0


def test_recent_tokens_halve(fleet: Fleet) -> None:
    fleet.dispatch("p0", "d0", 100, 80, 0.5, 0)
    fleet.dispatch("p0", "d0", 100, 80, 0.5, RECENT_HALF_LIFE_S)

    assert fleet["p0"].recent.at(RECENT_HALF_LIFE_S) == pytest.approx(120)
    assert fleet["p0"].recent.at(2 * RECENT_HALF_LIFE_S) == pytest.approx(60)


def test_other_routers_requests_count_too(fleet: Fleet) -> None:
    load = Load(running_requests=7)
    fleet.register(msgspec.structs.replace(registration("d0", "decode"), load=load), 1)

    assert fleet["d0"].running_requests == 7
