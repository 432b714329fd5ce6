"""Further attempts are a fraction of the requests, and a burst."""

from __future__ import annotations

from router.retry_budget import RetryBudget


def test_when_everything_fails_a_fraction_is_tried_again() -> None:
    budget, again = RetryBudget(fraction=0.2, burst=10), 0
    for _ in range(1000):
        budget.request()
        if budget.left():
            budget.take()
            again += 1

    assert 200 <= again <= 211


def test_without_a_burst_nothing_is_tried_again() -> None:
    budget = RetryBudget(fraction=0.2, burst=0)
    for _ in range(10):
        budget.request()

    assert not budget.left()
