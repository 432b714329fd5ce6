"""How long a pair may take is learned from what it took."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.handoff_times import HandoffTimes


def test_a_pair_that_is_always_slower_than_expected_gets_more_time() -> None:
    times = HandoffTimes(1, 100)
    for _ in range(30):
        times.learn("p0", "d0", expected_s=1.0, actual_s=9.0)

    assert 9 < times.limit_s("p0", "d0", 1.0) < 20
    assert times.limit_s("p1", "d0", 1.0) == 10  # nothing is known of it


def test_a_time_that_ran_out_doubles_the_next_and_a_delivery_ends_that() -> None:
    times = HandoffTimes(1, 100)
    before_s = times.limit_s("p0", "d0", 0.01)
    times.ran_out("p0", "d0")
    times.ran_out("p0", "d0")
    assert times.limit_s("p0", "d0", 0.01) == 4 * before_s
    times.learn("p0", "d0", 0.01, 0.02)
    assert times.limit_s("p0", "d0", 0.01) == before_s


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 1000)) | st.none(), max_size=40),
    st.floats(0, 1e4),
)
def test_a_limit_is_never_below_the_floor_nor_above_the_ceiling(
    observations: list[tuple[float, float] | None], expected_s: float
) -> None:
    times = HandoffTimes(2, 60)
    for observation in observations:
        if observation is None:
            times.ran_out("p0", "d0")
        else:
            times.learn("p0", "d0", *observation)
    assert 2 <= times.limit_s("p0", "d0", expected_s) <= 60
    times.forget("d0")
    assert times.limit_s("p0", "d0", expected_s) == HandoffTimes(2, 60).limit_s("p0", "d0", expected_s)
