"""Suspects are probed at once, tried with one request, and nothing of it outlives its cause."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from router.health import MAX_PROBE_S, MAX_TRIAL_S, Condition, Health


def test_a_suspect_is_probed_at_once_and_then_tried_with_one_request() -> None:
    health = Health()
    health.failed(10.0)
    assert (health.condition, health.probe_at_s, health.offered) == (Condition.SUSPECT, 10.0, False)

    health.probed(True, 10.1)
    assert (health.condition, health.offered) == (Condition.TRIAL, True)
    health.sent()
    assert not health.offered

    health.went_well()
    assert health.condition is Condition.HEALTHY
    assert health.offered


def test_a_trial_whose_client_left_is_followed_by_another() -> None:
    health = Health()
    health.failed(0)
    health.probed(True, 0)
    health.sent()
    health.ended()

    assert health.offered


def test_a_worker_that_answers_probes_and_fails_requests_is_tried_ever_more_rarely_up_to_a_bound() -> None:
    health, now_s, waits = Health(), 0.0, []
    for _ in range(8):
        health.failed(now_s)
        waits.append(health.probe_at_s - now_s)
        now_s = health.probe_at_s
        health.probed(True, now_s)
        health.sent()

    assert waits == [0, 0.25, 0.5, 1, 1, 1, 1, 1]
    assert waits[-1] == MAX_TRIAL_S


EVENT = st.sampled_from(["failed", "answered", "silent", "sent", "went_well", "ended"])


@given(st.lists(st.tuples(EVENT, st.floats(0, 5)), max_size=30))
def test_it_is_always_probed_again_soon_or_offered_and_a_success_ends_it_all(events: list[tuple[str, float]]) -> None:
    health, now_s = Health(), 0.0
    for event, passed_s in events:
        now_s += passed_s
        match event:
            case "answered" | "silent":
                health.probed(event == "answered", now_s)
            case "failed":
                health.failed(now_s)
            case "sent":
                health.sent()
            case "went_well":
                health.went_well()
            case "ended":
                health.ended()
        if health.condition is Condition.SUSPECT:
            assert not health.offered
            assert health.probe_at_s - now_s <= max(MAX_PROBE_S, MAX_TRIAL_S)
        else:
            assert health.probe_at_s == math.inf
    health.went_well()
    assert vars(health) == vars(Health())
