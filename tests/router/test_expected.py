"""Pages count from the moment a request is sent, and no longer than their events may take."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from router.expected import GRACE_S, Expected

IDS = (11, 12, 13, 14)


def test_a_sibling_finds_the_pages_before_their_events_come_and_only_where_they_are_computed() -> None:
    expected = Expected()
    expected.sent(1, "p0", IDS, 0)

    assert expected.pages("p0", (11, 12, 13, 99), 0) == 3
    assert expected.pages("p0", (98, 12, 13), 0) == 0
    assert expected.pages("p1", IDS, 0) == 0


def test_what_the_index_knows_is_where_expecting_begins() -> None:
    expected = Expected()
    expected.sent(1, "p0", IDS, 2)

    assert expected.pages("p0", IDS, 2) == 4
    assert expected.pages("p0", IDS, 4) == 4
    # The worker dropped the first two since: what is computed after them is of no use.
    assert expected.pages("p0", IDS, 0) == 0


def test_events_that_never_come_are_waited_for_no_longer_than_the_grace() -> None:
    expected = Expected()
    expected.sent(1, "p0", IDS, 0)
    expected.expire(1e9)
    assert expected.pages("p0", IDS, 0) == 4  # a prefill takes as long as it takes

    expected.prefilled(1, 10.0)
    expected.expire(10.0 + 0.99 * GRACE_S)
    assert expected.pages("p0", IDS, 0) == 4
    expected.expire(10.0 + GRACE_S)
    assert expected.pages("p0", IDS, 0) == 0


def test_the_pages_of_a_request_that_is_over_wait_out_their_grace() -> None:
    expected = Expected()
    expected.sent(1, "p0", IDS, 1)
    expected.prefilled(1, 10.0)
    expected.ended(1)

    assert expected.pages("p0", IDS, 1) == 4
    expected.expire(10.0 + GRACE_S)
    assert expected.pages("p0", IDS, 1) == 1
    assert len(expected) == 0


def test_a_failure_takes_its_pages_back_at_once_and_twice_is_as_good_as_once() -> None:
    expected = Expected()
    expected.sent(1, "p0", IDS, 0)
    expected.sent(2, "p0", (21, 22), 0)
    for _ in range(2):
        expected.failed(1)
        expected.ended(1)

    assert expected.pages("p0", IDS, 0) == 0
    assert expected.pages("p0", (21, 22), 0) == 2
    assert len(expected) == 1


def test_pages_that_two_requests_compute_are_expected_until_both_are_over() -> None:
    expected = Expected()
    expected.sent(1, "p0", (11, 12, 13), 0)
    expected.sent(2, "p0", (11, 12, 24), 0)

    expected.failed(1)
    assert expected.pages("p0", (11, 12, 13), 0) == 2
    expected.failed(2)
    assert expected.pages("p0", (11, 12, 24), 0) == 0


def test_requests_in_flight_share_what_they_begin_with() -> None:
    expected = Expected()
    expected.sent(1, "p0", IDS, 0)
    expected.sent(2, "p0", (*IDS, 15), 4)
    expected.sent(3, "p1", (*IDS, 16), 4)
    assert expected.sharing("p0", 14) == 2
    assert expected.sharing("p0", 15) == 1
    assert expected.sharing("p1", 14) == 1
    assert expected.sharing("p2", 14) == 0

    expected.prefilled(2, 0.0)
    assert expected.sharing("p0", 14) == 2  # it decodes, and is still in flight
    expected.ended(2)
    assert expected.sharing("p0", 14) == 1


def test_a_new_life_of_a_worker_begins_with_nothing_and_the_old_one_takes_nothing_off_it() -> None:
    expected = Expected()
    expected.sent(1, "p0", IDS, 1)
    expected.forget("p0")
    assert expected.pages("p0", IDS, 1) == 1
    assert expected.sharing("p0", 11) == 0

    expected.sent(2, "p0", IDS, 1)
    expected.failed(1)
    expected.ended(1)
    assert expected.pages("p0", IDS, 1) == 4
    assert expected.sharing("p0", 11) == 1
    assert len(expected) == 1


prompts = st.integers(0, 3).flatmap(
    lambda root: st.integers(0, 6).map(lambda n: tuple(root * 100 + i for i in range(n)))
)
requests = st.lists(
    st.tuples(
        st.sampled_from(["p0", "p1"]),
        prompts,
        st.integers(0, 6),  # leading pages that are there already, at most
        st.sampled_from(["prefilled", "failed", "twice"]),
        st.floats(0, 20),  # when its prefill is over
        st.floats(0, 20),  # how much later it ends
    ),
    max_size=20,
)


@settings(max_examples=80, deadline=None)
@given(requests, st.lists(st.tuples(st.floats(0, 40), st.sampled_from(["p0", "p1"])), max_size=2))
def test_nothing_is_left_over_when_all_requests_ended_and_the_grace_passed(
    sent: list[tuple[str, tuple[int, ...], int, str, float, float]], lost: list[tuple[float, str]]
) -> None:
    expected = Expected()
    steps: list[tuple[float, int, str, int | str]] = [(at_s, 0, "lost", worker) for at_s, worker in lost]
    for number, (worker, ids, matched_pages, outcome, prefilled_s, ending_s) in enumerate(sent):
        expected.sent(number, worker, ids, min(matched_pages, len(ids)))
        steps.append((prefilled_s, 1, outcome, number))
        steps.append((prefilled_s + ending_s, 2, "ended", number))
    for now_s, _, step, what in sorted(steps, key=lambda one: one[:2]):
        expected.expire(now_s)
        match step, what:
            case "lost", str(worker):
                expected.forget(worker)
            case "ended", int(number):
                expected.ended(number)
            case outcome, int(number):
                if outcome != "failed":
                    expected.prefilled(number, now_s)
                if outcome != "prefilled":
                    expected.failed(number)
    expected.expire(40 + GRACE_S)

    assert len(expected) == 0
    for worker, ids, *_ in sent:
        assert expected.pages(worker, ids, 0) == 0
        assert all(expected.sharing(worker, page) == 0 for page in ids)
