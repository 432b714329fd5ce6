"""How long somebody may take is learned from what it took."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.usual_times import UsualTimes


def test_a_pair_that_is_always_slower_than_expected_gets_more_time() -> None:
    times = UsualTimes(1, 100)
    for _ in range(30):
        times.learn(1.0, 9.0, "p0", "d0")

    assert 9 < times.limit_s(1.0, "p0", "d0") < 20
    assert times.limit_s(1.0, "p1", "d0") == 10  # nothing is known of it


def test_however_regular_it_was_the_margin_is_waited_for() -> None:
    times = UsualTimes(1, 1000, margin=4)
    for _ in range(100):
        times.learn(10.0, 20.0, "d0")

    assert 80 <= times.limit_s(10.0, "d0") < 81


def test_a_time_that_ran_out_doubles_the_next_and_a_success_ends_that() -> None:
    times = UsualTimes(1, 100)
    before_s = times.limit_s(0.01, "p0", "d0")
    times.ran_out("p0", "d0")
    times.ran_out("p0", "d0")
    assert times.limit_s(0.01, "p0", "d0") == 4 * before_s
    times.learn(0.01, 0.02, "p0", "d0")
    assert times.limit_s(0.01, "p0", "d0") == before_s


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 1000)) | st.none(), max_size=40),
    st.floats(0, 1e4),
)
def test_a_limit_is_never_below_the_floor_nor_above_the_ceiling(
    observations: list[tuple[float, float] | None], expected_s: float
) -> None:
    times = UsualTimes(2, 60)
    for observation in observations:
        if observation is None:
            times.ran_out("p0", "d0")
        else:
            times.learn(*observation, "p0", "d0")
    assert 2 <= times.limit_s(expected_s, "p0", "d0") <= 60
    times.forget("d0")
    assert times.limit_s(expected_s, "p0", "d0") == UsualTimes(2, 60).limit_s(expected_s, "p0", "d0")
