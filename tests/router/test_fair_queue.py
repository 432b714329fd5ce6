"""Tenants share by tokens; nobody starves; the queue is bounded and its room is shared too."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.fair_queue import FairQueue, Full, Waiting


def served(queue: FairQueue) -> Waiting:
    first = queue.first()
    assert first is not None
    queue.leave(first, served=True)
    return first


def test_a_flood_of_one_tenant_does_not_hold_up_another() -> None:
    queue = FairQueue(1000)
    for _ in range(100):
        queue.enter("flood", 1000)
    for _ in range(5):
        served(queue)
    queue.enter("late", 1000)

    assert "late" in [served(queue).tenant for _ in range(2)]


def test_many_small_requests_weigh_as_much_as_few_large_ones() -> None:
    queue = FairQueue(10_000)
    for _ in range(1000):
        queue.enter("small", 10)
    for _ in range(10):
        queue.enter("large", 1000)
    tokens: Counter[str] = Counter()
    for _ in range(505):
        one = served(queue)
        tokens[one.tenant] += one.tokens

    assert abs(tokens["small"] - tokens["large"]) <= 1000


def test_a_full_queue_takes_the_last_of_the_busiest_for_one_of_another_tenant() -> None:
    queue = FairQueue(3)
    places = [queue.enter("busy", 1)[0] for _ in range(3)]
    with pytest.raises(Full):
        queue.enter("busy", 1)

    _, pushed_out = queue.enter("other", 1)

    assert pushed_out is places[-1]
    with pytest.raises(Full):
        queue.enter("other", 1)
    assert len(queue) == 3


def test_a_queue_without_places_takes_nobody() -> None:
    with pytest.raises(Full):
        FairQueue(0).enter("a", 1)


def test_one_that_gives_up_lets_nobody_overtake_its_tenants_others() -> None:
    queue = FairQueue(10)
    queue.enter("a", 1)
    first, second, third = (queue.enter("b", tokens)[0] for tokens in (5, 1, 1))
    queue.leave(first, served=False)
    fourth, _ = queue.enter("b", 1)
    served(queue)
    assert [served(queue) for _ in range(3)] == [second, third, fourth]


STEP = st.tuples(st.sampled_from("abc"), st.integers(1, 50), st.sampled_from(["enter", "serve", "give up"]))


@given(st.lists(STEP, max_size=80), st.integers(1, 12))
def test_it_is_bounded_keeps_each_tenants_order_and_forgets_everything_in_the_end(
    steps: list[tuple[str, int, str]], limit: int
) -> None:
    queue = FairQueue(limit)
    inside: list[Waiting] = []
    for tenant, tokens, act in steps:
        if act == "enter":
            try:
                place, pushed_out = queue.enter(tenant, tokens)
            except Full:
                assert len(inside) == limit
                continue
            inside.append(place)
            if pushed_out is not None:
                inside.remove(pushed_out)
        elif inside and act == "serve":
            one = served(queue)
            assert one is next(other for other in inside if other.tenant == one.tenant)
            inside.remove(one)
        elif inside:
            queue.leave(inside.pop(tokens % len(inside)), served=False)
        assert len(queue) == len(inside) <= limit
        assert queue.tokens == sum(place.tokens for place in inside)
    while inside:
        inside.remove(served(queue))
    assert queue.first() is None
    assert not queue._of


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 50)), min_size=1, max_size=60))
def test_while_both_wait_neither_is_ahead_by_more_than_their_largest_requests(
    requests: list[tuple[str, int]],
) -> None:
    queue = FairQueue(100)
    for tenant, tokens in requests:
        queue.enter(tenant, tokens)
    left, tokens_of = Counter(tenant for tenant, _ in requests), Counter({"a": 0, "b": 0})
    largest = max(tokens for _, tokens in requests)
    while left["a"] and left["b"]:
        one = served(queue)
        left[one.tenant] -= 1
        tokens_of[one.tenant] += one.tokens
        assert abs(tokens_of["a"] - tokens_of["b"]) <= 2 * largest
