"""What agrees is trusted, what differs is taken anew, and what cannot be mended is asked for less and less."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from router.audit import FIRST_HEAL_S, LONGEST_HEAL_S, MAX_AUDITED, Audits

pages = st.sets(st.integers(0, 20), max_size=12)


@given(pages, pages)
def test_agreement_is_what_both_name_of_what_either_names(held: set[int], known: set[int]) -> None:
    audits = Audits()
    heal = audits.compared("p0", held, known, True, 0)

    either = len(held | known)
    assert audits["p0"].agreement == (len(held & known) / either if either else 1.0)
    assert heal is (held != known)
    assert audits["p0"].trusted is (held == known)
    assert (audits["p0"].audits, audits["p0"].heals) == (1, int(heal))


@given(pages, pages)
def test_an_index_without_room_for_all_may_lack_pages_and_may_have_none_too_many(
    held: set[int], known: set[int]
) -> None:
    assert Audits().compared("p0", held, known, False, 0) is not known.issubset(held)


def test_an_index_that_was_refuted_is_trusted_again_once_an_audit_agrees() -> None:
    audits = Audits()
    audits.compared("p0", {1}, {2}, True, 0)
    assert not audits["p0"].trusted

    audits.compared("p0", {1}, {1}, True, 5)
    assert audits["p0"].trusted
    assert (audits["p0"].audits, audits["p0"].refuted, audits["p0"].heals) == (2, 1, 1)


def test_a_worker_that_stays_wrong_is_healed_less_and_less_often() -> None:
    audits = Audits()
    healed_s = [at_s for at_s in range(0, 3600, 1) if audits.compared("p0", {1}, {2}, True, at_s)]
    waits = [later - earlier for earlier, later in pairwise(healed_s)]

    assert waits[:3] == [FIRST_HEAL_S, 2 * FIRST_HEAL_S, 4 * FIRST_HEAL_S]
    assert max(waits) == LONGEST_HEAL_S
    # One that agreed meanwhile begins anew.
    audits.compared("p0", {1}, {1}, True, 3600)
    assert audits.compared("p0", {1}, {2}, True, 3601)


def test_workers_are_judged_each_for_itself_and_one_never_audited_is_trusted() -> None:
    audits = Audits()
    audits.compared("p0", {1}, {2}, True, 0)

    assert audits["p1"].trusted
    assert audits["p1"].audits == 0
    assert dict(audits).keys() == {"p0"}


def test_a_worker_that_is_followed_from_nothing_is_trusted_and_keeps_its_sums() -> None:
    audits = Audits()
    audits.compared("p0", {1}, {2}, True, 0)
    audits.began("p0")

    assert audits["p0"].trusted
    assert audits["p0"].heals == 1


def test_names_that_come_and_go_take_no_memory_without_end() -> None:
    audits = Audits()
    for number in range(MAX_AUDITED + 10):
        audits.compared(f"w{number}", set(), set(), True, 0)

    assert len(dict(audits)) == MAX_AUDITED
