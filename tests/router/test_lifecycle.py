"""The table of a request's life, every path of it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.lifecycle import LIVE, TABLE, Event, Impossible, Limits, Next, Phase, Situation, after, step


@given(st.lists(st.sampled_from(list(Event)), max_size=12))
def test_what_is_over_stays_over_and_decode_alone_ends_it_well(events: list[Event]) -> None:
    phase = Phase.SENT
    for event in events:
        before = phase
        try:
            phase = step(phase, event)
        except Impossible:
            assert before is Phase.DELIVERED
            assert event is Event.PREFILLED
            continue
        if before not in LIVE:
            assert phase is before
        if phase is Phase.DONE and before is not Phase.DONE:
            assert event is Event.ANSWERED


@pytest.mark.parametrize("phase", LIVE)
def test_every_live_phase_has_a_way_out_for_every_end(phase: Phase) -> None:
    ends = {Event.ANSWERED, Event.DECODE_FAILED, Event.MOVED, Event.GONE, Event.EXPIRED}
    assert all(TABLE[phase, event] not in LIVE for event in ends)


def test_prefill_matters_until_it_has_delivered_or_decode_has_a_token() -> None:
    assert step(Phase.SENT, Event.PREFILL_FAILED) is Phase.FAILED
    assert step(Phase.DELIVERED, Event.PREFILL_FAILED) is Phase.DELIVERED
    assert step(Phase.STREAMING, Event.PREFILL_FAILED) is Phase.STREAMING
    assert step(step(Phase.SENT, Event.TOKEN), Event.PREFILLED) is Phase.STREAMING


LIMITS = Limits(retries=2, resumes=1)


@given(
    st.builds(
        Situation,
        client_to_blame=st.booleans(),
        moved=st.booleans(),
        begun=st.booleans(),
        hindrance=st.sampled_from(["", "tools"]),
        retries=st.integers(0, 3),
        resumes=st.integers(0, 2),
        decoded=st.booleans(),
    ),
    st.booleans(),
)
def test_nothing_is_tried_again_that_the_client_has_seen_a_part_of_and_nothing_without_end(
    situation: Situation, budget: bool
) -> None:
    following, why = after(situation, LIMITS, budget)

    assert bool(why) == (following is Next.TELL)
    if following is Next.RETRY:
        assert not situation.begun
        assert situation.moved or situation.retries < LIMITS.retries
    if following is Next.RESUME:
        assert situation.begun
        assert not situation.hindrance
        tries_left = situation.retries < LIMITS.retries
        assert situation.moved or (situation.resumes < LIMITS.resumes if situation.decoded else tries_left)
    if situation.client_to_blame or not (budget or situation.moved):
        assert following is Next.TELL


def test_a_failed_request_is_tried_so_often_and_told_then() -> None:
    told = []
    for retries in itertools.count():
        following, why = after(Situation(False, False, False, "", retries, 0, False), LIMITS, budget=True)
        if following is Next.TELL:
            told.append(why)
            break
    assert retries == 2
    assert told == ["tried 3 times"]
