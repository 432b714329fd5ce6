"""Hand-off sessions: whatever happens in whatever order, they end, and never free a page too early."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.session import (
    TERMINAL,
    Event,
    IllegalEvent,
    ReceiverState,
    SenderState,
    next_receiver,
    next_sender,
)

events = st.lists(st.sampled_from(Event), max_size=12)


@given(events)
def test_a_failure_ends_any_sender_and_nothing_moves_it_again(before: list[Event]) -> None:
    state = SenderState.ABSENT
    for event in before:
        try:
            state = next_sender(state, event)
        except IllegalEvent:
            continue

    ended = next_sender(state, Event.FAILED)

    assert ended in TERMINAL
    assert all(next_sender(ended, event) is ended for event in Event)


@given(events)
def test_a_stopped_writer_ends_any_receiver(before: list[Event]) -> None:
    state = ReceiverState.CONNECTING
    for event in before:
        try:
            state = next_receiver(state, event)
        except IllegalEvent:
            continue

    assert next_receiver(state, Event.STOPPED) in TERMINAL


@given(events)
def test_granted_pages_come_free_only_when_all_landed_or_the_writer_stopped(sequence: list[Event]) -> None:
    state, granted, writer_may_write = ReceiverState.CONNECTING, False, False
    for event in sequence:
        before = state
        try:
            state = next_receiver(state, event)
        except IllegalEvent:
            assert state is before
            continue
        if before in TERMINAL:
            continue
        granted = granted or event is Event.GRANTED
        writer_may_write = granted and event not in (Event.STOPPED, Event.LAST)
        if before is ReceiverState.FENCING and event is Event.LAST:
            writer_may_write = True

        assert not (state in TERMINAL and writer_may_write)


def test_success_needs_the_receivers_acknowledgement() -> None:
    state = SenderState.ABSENT
    for event in (Event.OFFERED, Event.GRANTED, Event.CHUNK, Event.LAST):
        state = next_sender(state, event)

    assert state is SenderState.LANDING
    assert next_sender(state, Event.ACKED) is SenderState.DONE


def test_either_side_may_speak_first() -> None:
    offered_first = next_sender(next_sender(SenderState.ABSENT, Event.OFFERED), Event.GRANTED)
    granted_first = next_sender(next_sender(SenderState.ABSENT, Event.GRANTED), Event.OFFERED)

    assert offered_first is granted_first is SenderState.GRANTED


def test_an_event_that_does_not_fit_says_which_and_where() -> None:
    with pytest.raises(IllegalEvent, match="sender: wanted an event that fits OFFERED, found ACKED"):
        next_sender(SenderState.OFFERED, Event.ACKED)
    with pytest.raises(IllegalEvent, match="receiver: wanted an event that fits CONNECTING, found LAST"):
        next_receiver(ReceiverState.CONNECTING, Event.LAST)
