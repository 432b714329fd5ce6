"""A feed without gaps, whatever comes in whatever order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from router.fleet import FeedMode
from router.sequence import ANSWER_S, CUT_OFF_S, LAG_S, MAX_BUFFERED, MISSED_AUDITS, Sequence, Step
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
    assert sequence.answered(Snapshot("p0", 1, 1, [Stored(9, 5, [1])]), 0) == Step()
    assert sequence.answered(caught_up(3), 0) == Step(ask=EVERYTHING)
    assert not sequence.exact
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


def test_batches_that_only_changed_places_need_no_answer() -> None:
    sequence = exact_at(3)
    sequence.live(batch(6), 0)
    assert sequence.live(batch(5), 0) == Step()

    assert applied(sequence.live(batch(4), 0)) == [Removed([4]), Removed([5]), Removed([6])]
    assert sequence.exact
    assert sequence.position == 6
    # The answer to the question that went out meanwhile comes for nobody.
    assert sequence.answered(batch(4), 0) == Step()
    assert sequence.answered(caught_up(4), 0) == Step()


def test_a_late_batch_that_leaves_a_hole_behind_it_closes_only_its_own() -> None:
    sequence = exact_at(3)
    sequence.live(batch(7), 0)

    assert applied(sequence.live(batch(4), 0)) == [Removed([4])]
    assert not sequence.exact
    # The answer was asked after 3, and what it brings again is not applied again.
    assert [applied(sequence.answered(batch(number), 0)) for number in (4, 5, 6)] == [
        [],
        [Removed([5])],
        [Removed([6])],
    ]
    assert applied(sequence.answered(caught_up(6), 0)) == [Removed([7])]
    assert sequence.exact


def test_an_audit_after_a_batch_that_did_not_come_shows_the_loss_at_once() -> None:
    sequence = exact_at(3)

    assert sequence.reached(1, 3, 0) == Step()
    assert sequence.stands_at(1, 3)
    assert sequence.reached(1, 4, 0).ask == PageRequest(1, 3)
    assert not sequence.stands_at(1, 4)


def test_an_audit_of_another_life_is_none_of_this_one() -> None:
    sequence = exact_at(3)

    assert sequence.reached(0, 9, 0) == Step()
    assert sequence.reached(2, 9, 0) == Step((Cleared(),), EVERYTHING)
    assert sequence.epoch == 2


def test_pages_that_were_refuted_are_asked_for_from_nothing_and_no_replay_stands_in_for_them() -> None:
    sequence = exact_at(3)

    assert sequence.refuted(0) == Step(ask=EVERYTHING)
    assert sequence.mode(0) is FeedMode.APPROXIMATE
    for older in (3, 0):
        assert sequence.answered(caught_up(older), 0).ask == EVERYTHING
    assert applied(sequence.answered(Snapshot("p0", 1, 0, []), 0)) == [Cleared()]
    sequence.answered(caught_up(3), 0)
    assert sequence.stands_at(1, 3)


def test_nothing_usable_is_known_until_first_contact_is_over() -> None:
    sequence = Sequence(epoch=1)
    sequence.start(0)
    assert sequence.mode(0) is FeedMode.LOAD_ONLY
    sequence.answered(Snapshot("p0", 1, 0, [Stored(9, 0, [1])]), 0)
    assert sequence.mode(0) is FeedMode.LOAD_ONLY

    sequence.answered(caught_up(7), 0)
    assert sequence.mode(1000) is FeedMode.EXACT
    sequence.live(batch(1, epoch=2), 1000)
    assert sequence.mode(1000) is FeedMode.LOAD_ONLY


def test_pages_with_a_gap_are_approximate_and_worthless_once_nobody_answers() -> None:
    sequence = exact_at(3)
    sequence.live(batch(5), 10)

    assert sequence.mode(10) is FeedMode.APPROXIMATE
    assert sequence.mode(10 + CUT_OFF_S - 0.1) is FeedMode.APPROXIMATE
    assert sequence.mode(10 + CUT_OFF_S) is FeedMode.LOAD_ONLY
    # Asking again is no answer, and more of what has a gap before it is none either.
    sequence.tick(10 + ANSWER_S)
    sequence.live(batch(6), 10 + ANSWER_S)
    assert sequence.mode(10 + ANSWER_S) is FeedMode.LOAD_ONLY
    # A snapshot under way is progress.
    sequence.answered(Snapshot("p0", 1, 0, []), 20)
    assert sequence.mode(20) is FeedMode.APPROXIMATE
    sequence.answered(caught_up(6), 20)
    assert sequence.mode(1000) is FeedMode.EXACT


def test_a_publisher_that_is_silent_over_its_audits_is_asked_the_other_way() -> None:
    sequence = exact_at(3)
    sequence.announced(3, audit_s=5)
    silence_s = MISSED_AUDITS * 5 + LAG_S
    assert sequence.tick(silence_s - 0.1) == Step()
    sequence.reached(1, 3, silence_s - 0.1)
    assert sequence.tick(silence_s) == Step()

    assert sequence.tick(2 * silence_s).ask == PageRequest(1, 3)
    sequence.answered(caught_up(3), 2 * silence_s)
    assert sequence.exact
    assert sequence.tick(2 * silence_s + 1) == Step()


def test_a_worker_without_audits_may_be_silent_for_ever() -> None:
    sequence = exact_at(3)
    sequence.announced(3)

    assert sequence.tick(1e9) == Step()


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
    late: list[int] = []

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
            match data.draw(st.sampled_from(["delivered", "twice", "late", "lost"]), label="network"):
                case "delivered":
                    take(sequence.live(batch(published), now_s))
                case "twice":
                    take(sequence.live(batch(published), now_s))
                    take(sequence.live(batch(published), now_s))
                case "late":
                    late.append(published)
            if data.draw(st.booleans(), label="a late one comes") and late:
                place = data.draw(st.integers(0, len(late) - 1), label="which")
                take(sequence.live(batch(late.pop(place)), now_s))
            if data.draw(st.booleans(), label="audit"):
                take(sequence.reached(1, published, now_s))
                if sequence.stands_at(1, published):
                    assert seen == list(range(1, published + 1)), "an audit would find it wrong"
                    if data.draw(st.booleans(), label="refuted all the same"):
                        take(sequence.refuted(now_s))
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
