"""Who lets whom go first, of requests that begin alike: what is computed once is found by the others one pass later."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from engine.siblings import LEAST_TOKENS, LOOKED_AT, Cached, Prompt, followers

PART_TOKENS = LEAST_TOKENS // 2
"""A prompt is a row of parts: two that it shares with another are just enough."""
Parts = Sequence[int]


def tokens(parts: Parts) -> array[int]:
    return array("q", [1000 * part + token for part in parts for token in range(PART_TOKENS)])


def prompt(parts: Parts, cached: Sequence[Parts] = (), space: str | None = None) -> Prompt:
    """A request for these parts, where the cache has what `cached` were."""

    def known() -> Cached:
        count = max((shared(parts, one) for one in cached), default=0)
        return Cached(tuple(parts[:count]), PART_TOKENS * count)

    return Prompt(tokens(parts), space, known)


def shared(some: Parts, others: Parts) -> int:
    """Leading parts in common."""
    return next(
        (place for place, (a, b) in enumerate(zip(some, others, strict=False)) if a != b), min(len(some), len(others))
    )


def test_the_first_of_those_that_begin_alike_is_computed_and_the_others_wait() -> None:
    waiting = [prompt([1, 2, 3]), prompt([7, 8]), prompt([1, 2, 4]), prompt([1, 2]), prompt([7, 9])]

    assert followers(waiting, []) == [2, 3]


def test_what_is_cached_already_is_no_reason_to_wait() -> None:
    cached = [[1, 2]]
    waiting = [prompt([1, 2, 3], cached), prompt([1, 2, 4], cached), prompt([1, 2, 3, 5], cached)]

    assert followers(waiting, []) == []
    assert followers([prompt([1, 2, 3, 4, 5], cached), prompt([1, 2, 3, 4, 6], cached)], []) == [1]


def test_a_pass_that_is_under_way_is_waited_for_until_its_pages_are_in_the_cache() -> None:
    under_way = prompt([1, 2, 3])

    assert followers([prompt([1, 2, 9])], [under_way]) == [0]
    assert followers([prompt([1, 2, 9], cached=[[1, 2, 3]])], [under_way]) == []


def test_prompts_of_different_spaces_wait_for_nobody() -> None:
    assert followers([prompt([1, 2], space="red"), prompt([1, 2], space="blue"), prompt([1, 2])], []) == []


def test_a_short_beginning_is_computed_twice() -> None:
    assert followers([prompt([1, 2]), prompt([1, 3]), prompt([1]), prompt([1])], []) == []


def test_of_a_long_queue_only_so_many_are_looked_at_as_could_be_computed_next() -> None:
    alone = [prompt([place, place]) for place in range(LOOKED_AT)]

    assert followers([*alone, prompt([0, 0])], []) == []
    assert followers([*alone[1:], prompt([0, 0])], [prompt([0, 0])]) == [LOOKED_AT - 1]


def test_those_that_wait_make_no_room_for_others_like_them() -> None:
    assert followers([prompt([1, 2, place]) for place in range(100)], []) == list(range(1, 100))


def test_alike_is_alike_by_a_whole_page_of_a_cache_with_long_ones() -> None:
    def long(last: int) -> Prompt:
        return Prompt(tokens([1, 2, 3, last]), None, lambda: Cached("nothing", 0), least=4 * PART_TOKENS)

    assert followers([long(4), long(5), long(4)], []) == [2]


PROMPTS = st.lists(st.lists(st.integers(1, 3), max_size=5), max_size=8)


@given(PROMPTS, PROMPTS, PROMPTS)
def test_who_waits_finds_more_for_it_and_who_does_not_would_find_nothing(
    waiting: list[list[int]], computing: list[list[int]], cached: list[list[int]]
) -> None:
    def lacks_in_common(one: Parts, other: Parts) -> int:
        """Tokens that one lacks and would find once the other was computed."""
        return PART_TOKENS * (shared(one, other) - max((shared(one, held) for held in cached), default=0))

    found = followers([prompt(parts, cached) for parts in waiting], [prompt(parts, cached) for parts in computing])

    for place, one in enumerate(waiting):
        first = [*computing, *(other for earlier, other in enumerate(waiting[:place]) if earlier not in found)]
        worth = max((lacks_in_common(one, other) for other in first), default=0) >= LEAST_TOKENS
        assert worth == (place in found)
