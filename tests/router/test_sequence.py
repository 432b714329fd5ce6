"""A feed without gaps, whatever comes in whatever order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from router.sequence import ANSWER_S, LAG_S, MAX_BUFFERED, Sequence, Step
from transfer.wire import Batch, CaughtUp, Cleared, PageEvent, PageRequest, Removed, Snapshot, Stored

EVERYTHING = PageRequest(0, 0)


def batch(sequence: int, epoch: int = 1) -> Batch:
    return Batch("p0", epoch, sequence, [Removed([sequence])])


def caught_up(sequence: int, epoch: int = 1) -> CaughtUp:
    return CaughtUp("p0", epoch, sequence)


def exact_at(position: int) -> Sequence:
    """A feed that has caught up to `position`."""
    sequence = Sequence(epoch=1)
    sequence.start(0)
    sequence.answered(Snapshot("p0", 1, 0, []), 0)
    sequence.answered(caught_up(position), 0)
    return sequence


def applied(step: Step) -> list[PageEvent]:
    return list(step.events)


def test_first_contact_asks_for_everything() -> None:
    sequence = Sequence(epoch=1)

    assert sequence.start(0).ask == EVERYTHING
    assert not sequence.exact


def test_live_batches_in_order_are_applied_as_they_come() -> None:
    sequence = exact_at(3)

    assert applied(sequence.live(batch(4), 0)) == [Removed([4])]
    assert sequence.exact
    assert sequence.position == 4


def test_a_batch_that_came_already_changes_nothing() -> None:
    sequence = exact_at(3)

    assert sequence.live(batch(3), 0) == Step()
    assert sequence.live(batch(2), 0) == Step()


def test_a_gap_is_asked_for_and_closed_by_replay() -> None:
    sequence = exact_at(3)

    step = sequence.live(batch(6), 0)
    assert step == Step(ask=PageRequest(1, 3))
    assert not sequence.exact

    assert applied(sequence.answered(batch(4), 0)) == [Removed([4])]
    assert applied(sequence.answered(batch(5), 0)) == [Removed([5])]
    # The answer ends at 5, and 6 waits in the buffer.
    assert applied(sequence.answered(caught_up(5), 0)) == [Removed([6])]
    assert sequence.exact
    assert sequence.position == 6


def test_a_snapshot_replaces_all_and_live_batches_after_it_follow() -> None:
    sequence = Sequence(epoch=1)
    sequence.start(0)
    page, next_page = Stored(9, 0, [1]), Stored(1, 1, [2])

    assert sequence.live(batch(7), 0) == Step()
    assert sequence.live(batch(8), 0) == Step()
    assert applied(sequence.answered(Snapshot("p0", 1, 0, [page]), 0)) == [Cleared(), page]
    assert applied(sequence.answered(Snapshot("p0", 1, 1, [next_page]), 0)) == [next_page]
    # The snapshot covers 7, so only 8 is applied.
    assert applied(sequence.answered(caught_up(7), 0)) == [Removed([8])]
    assert sequence.position == 8


def test_a_snapshot_with_a_missing_part_is_asked_for_again() -> None:
    sequence = Sequence(epoch=1)
    sequence.start(0)
    sequence.answered(Snapshot("p0", 1, 0, []), 0)

    assert sequence.answered(Snapshot("p0", 1, 2, [Stored(9, 5, [1])]), 0) == Step()
    assert sequence.tick(ANSWER_S).ask == EVERYTHING
    # Then the rest of the first answer comes late, and is not taken for a part of the second.
    assert sequence.answered(Snapshot("p0", 1, 1, [Stored(9, 5, [1])]), ANSWER_S) == Step()


def test_an_answer_that_does_not_come_is_asked_for_again() -> None:
    sequence = Sequence(epoch=1)
    sequence.start(0)

    assert sequence.tick(ANSWER_S - 0.1) == Step()
    assert sequence.tick(ANSWER_S).ask == EVERYTHING
    assert sequence.tick(ANSWER_S + 0.1) == Step()
    assert sequence.tick(2 * ANSWER_S).ask == EVERYTHING


def test_an_answer_that_makes_progress_is_given_time() -> None:
    sequence = Sequence(epoch=1)
    sequence.start(0)
    sequence.answered(Snapshot("p0", 1, 0, []), ANSWER_S - 1)

    assert sequence.tick(ANSWER_S + 1) == Step()
    assert sequence.tick(2 * ANSWER_S - 1).ask == EVERYTHING


def test_a_lost_tail_is_noticed_by_what_the_worker_announces() -> None:
    sequence = exact_at(3)
    sequence.announced(5)

    assert sequence.tick(10) == Step()  # may still be on its way
    assert sequence.tick(10 + LAG_S).ask == PageRequest(1, 3)


def test_a_tail_that_is_only_late_is_not_asked_for() -> None:
    sequence = exact_at(3)
    sequence.announced(4)
    sequence.tick(10)
    sequence.live(batch(4), 10.5)

    assert sequence.tick(10 + LAG_S) == Step()


def test_a_new_epoch_forgets_and_asks_for_everything() -> None:
    sequence = exact_at(3)

    step = sequence.live(batch(1, epoch=2), 0)

    assert step == Step((Cleared(),), EVERYTHING)
    assert sequence.epoch == 2
    # Its first batch was kept.
    sequence.answered(Snapshot("p0", 2, 0, []), 0)
    assert applied(sequence.answered(caught_up(0, epoch=2), 0)) == [Removed([1])]


def test_an_older_epoch_is_not_listened_to() -> None:
    sequence = exact_at(3)
    sequence.live(batch(1, epoch=2), 0)

    assert sequence.live(batch(4, epoch=1), 0) == Step()
    assert sequence.answered(caught_up(4, epoch=1), 0) == Step()
    assert not sequence.exact


def test_an_answer_nobody_waits_for_changes_nothing() -> None:
    sequence = exact_at(3)

    assert sequence.answered(Snapshot("p0", 1, 0, []), 0) == Step()
    assert sequence.answered(batch(4), 0) == Step()
    assert sequence.answered(caught_up(9), 0) == Step()
    assert sequence.position == 3


def test_a_buffer_that_overflows_leads_to_another_question() -> None:
    sequence = Sequence(epoch=1)
    sequence.start(0)
    for number in range(1, MAX_BUFFERED + 3):
        sequence.live(batch(number), 0)
    sequence.answered(Snapshot("p0", 1, 0, []), 0)

    # The snapshot is as of 0, and 1 and 2 were pushed out.
    assert sequence.answered(caught_up(0), 0).ask == EVERYTHING


def test_a_replay_with_a_hole_is_asked_for_again() -> None:
    sequence = exact_at(3)
    sequence.live(batch(7), 0)
    sequence.answered(batch(4), 0)

    assert sequence.answered(batch(6), 0) == Step()
    assert sequence.answered(caught_up(6), 0).ask == PageRequest(1, 4)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_loss_on_the_way_is_made_good(data: st.DataObject) -> None:
    """A worker that publishes through a bad network: what is applied is what it published, in order, once."""
    sequence, published = Sequence(epoch=1), 0
    seen: list[int] = []
    now_s = 0.0
    asks: list[PageRequest] = []

    def take(step: Step) -> None:
        for event in step.events:
            if isinstance(event, Cleared):
                seen.clear()
            elif isinstance(event, Removed):
                seen.extend(event.ids)
            else:
                seen.extend(event.ids)
        if step.ask is not None:
            asks.append(step.ask)

    def answer() -> None:
        ask = asks.pop()
        lossy = data.draw(st.booleans(), label="a part of the answer is lost")
        if ask.epoch and data.draw(st.booleans(), label="replay"):
            parts: list[Batch | Snapshot] = [batch(number) for number in range(ask.sequence + 1, published + 1)]
        else:
            parts = [Snapshot("p0", 1, 0, [Stored(0, 0, list(range(1, published + 1)))]), Snapshot("p0", 1, 1, [])]
        if lossy:
            parts = parts[1:]
        for part in parts:
            take(sequence.answered(part, now_s))
        take(sequence.answered(caught_up(published), now_s))

    take(sequence.start(now_s))
    for _ in range(data.draw(st.integers(1, 25), label="steps")):
        if data.draw(st.booleans(), label="publish"):
            published += 1
            if data.draw(st.booleans(), label="delivered"):
                take(sequence.live(batch(published), now_s))
        elif asks:
            answer()
        now_s += data.draw(st.sampled_from([0.0, 1.0, 6.0]), label="time")
        take(sequence.tick(now_s))
    for _ in range(4):  # the network is well again
        sequence.announced(published)
        take(sequence.tick(now_s))
        now_s += ANSWER_S
        take(sequence.tick(now_s))
        while asks:
            asks[:] = asks[-1:]
            ask = asks.pop()
            for number in range(ask.sequence + 1, published + 1) if ask.epoch else ():
                take(sequence.answered(batch(number), now_s))
            if not ask.epoch:
                take(sequence.answered(Snapshot("p0", 1, 0, [Stored(0, 0, list(range(1, published + 1)))]), now_s))
            take(sequence.answered(caught_up(published), now_s))

    assert sequence.exact
    assert sequence.position == published
    assert seen == list(range(1, published + 1))
