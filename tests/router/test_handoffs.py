"""Sums over hand-offs outlive the workers' lives, and each hand-off finds the request that it was for."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from router.config import CostConfig
from router.cost import CostModel
from router.decision import Decision
from router.handoffs import Handoffs
from router.ledger import KEPT_REQUESTS, Ledger, Record
from router.pairs import Pairs
from router.policy import Ask, DecodeView, Pick, PrefillView
from transfer.ended import Ended
from transfer.wire import HandoffTotals

P0, D0 = PrefillView(name="p0"), DecodeView(name="d0")
ASK = Ask(number=1, prompt_tokens=9, page_tokens=16)
DECISION = Decision(Pairs(ASK, [P0], [D0], CostModel(CostConfig())), Pick(P0, D0, ""), "mainstem", alpha=4)


def ended(room: int = 1, prefill: str = "p0", transport: str = "shm", reason: str = "", pages: int = 3) -> Ended:
    moved_bytes = 0 if reason else pages * 100
    return Ended(
        room,
        prefill,
        transport,
        pages,
        moved_bytes,
        prefix_tokens=16,
        took_s=0.5,
        reason=reason,
        opening_s=0.125,
        computing_s=0.25,
    )


def tally(handoffs: list[Ended]) -> list[HandoffTotals]:
    """As a worker's agent adds them up."""
    sums: dict[HandoffTotals, HandoffTotals] = {}
    for one in handoffs:
        kind = HandoffTotals.kind(one)
        sums[kind] = sums.get(kind, kind).plus(one)
    return list(sums.values())


def record(name: str) -> Record:
    return Record(id=name, at_s=0, started_s=0, endpoint="/", stream=False, decision=DECISION, prompt_tokens=9)


some = st.lists(
    st.builds(
        ended,
        prefill=st.sampled_from(["p0", "p1"]),
        transport=st.sampled_from(["shm", "tcp"]),
        reason=st.sampled_from(["", "lost"]),
        pages=st.integers(0, 9),
    ),
    max_size=8,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(some, max_size=4), st.data())
def test_sums_are_those_of_all_lives_however_often_each_registers(
    lives: list[list[Ended]], data: st.DataObject
) -> None:
    handoffs = Handoffs()
    for epoch, life in enumerate(lives):
        heard = sorted(data.draw(st.lists(st.integers(0, len(life)), max_size=3)))
        for count in (*heard, len(life), len(life)):
            handoffs.registered("d0", epoch, tally(life[:count]))
            if epoch:
                handoffs.registered("d0", epoch - 1, tally(lives[epoch - 1]))  # late, and known already
        handoffs.registered("d1", epoch, tally(life[:1]))

    everything = tally([one for life in lives for one in life])
    assert sorted(one.handoffs for _, one in handoffs if _ == "d0") == sorted(one.handoffs for one in everything)
    found = {(one.prefill, one.transport, one.outcome): one for decode, one in handoffs if decode == "d0"}
    for one in everything:
        assert found[one.prefill, one.transport, one.outcome] == one


def test_what_failed_counts_as_a_handoff_and_moves_nothing() -> None:
    failed = HandoffTotals.kind(ended(reason="lost")).plus(ended(reason="lost"))

    assert (failed.outcome, failed.handoffs, failed.took_s) == ("failed", 1, 0.5)
    assert (failed.pages, failed.moved_bytes, failed.prefix_tokens, failed.handover_s) == (0, 0, 0, 0.0)


def test_a_handoff_finds_its_request_and_those_of_a_batch_find_the_same_one() -> None:
    ledger, single, batch = Ledger(), record("a"), record("b")
    for one, room, prompts in ((single, 10, 1), (batch, 11, 3)):
        ledger.begin(one)
        ledger.expect(one, room, prompts)

    for room in (10, 13, 11, 14):
        ledger.handed_over(ended(room))

    assert [one.room for one in single.handoffs] == [10]
    assert [one.room for one in batch.handoffs] == [13, 11]


def test_a_handoff_is_noted_once_and_not_at_all_for_a_request_that_is_not_kept() -> None:
    ledger, first = Ledger(), record("first")
    ledger.begin(first)
    ledger.expect(first, 1, 1)
    ledger.handed_over(ended(1))
    ledger.handed_over(ended(1))
    gone = record("gone")
    ledger.begin(gone)
    ledger.expect(gone, 2, 1)
    for number in range(KEPT_REQUESTS):
        ledger.begin(record(str(number)))
    ledger.handed_over(ended(2))

    assert len(first.handoffs) == 1
    assert gone.handoffs == []
