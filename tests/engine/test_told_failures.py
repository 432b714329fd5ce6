"""A tick hears of few failures, and of all of them in the end."""

from hypothesis import given
from hypothesis import strategies as st

from engine.told_failures import AT_ONCE, tell

FAILED, WAITING, FINE = 0, 3, 4


@given(st.lists(st.sampled_from([FAILED, WAITING, FINE])))
def test_all_failures_are_told_few_at_a_time_and_nothing_else_changes(polls: list[int]) -> None:
    left, told, ticks = list(polls), 0, 0
    while FAILED in left:
        heard = tell(left, FAILED, WAITING)
        assert len(heard) == len(left)
        assert all(one == other for one, other in zip(heard, left, strict=True) if other != FAILED)
        ended = [index for index, poll in enumerate(heard) if poll == FAILED]
        assert 0 < len(ended) <= AT_ONCE
        told += len(ended)
        ticks += 1
        left = [poll for index, poll in enumerate(left) if index not in ended]

    assert told == polls.count(FAILED)
    assert ticks == -(-told // AT_ONCE)
