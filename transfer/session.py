"""One hand-off as a state table, once for each side. The same for every transport.

    sender (prefill)      ABSENT ─offered─> OFFERED ─granted─> GRANTED ─chunk─> STREAMING ─last─> LANDING ─acked─> DONE
                          ABSENT ─granted─> RESERVED ─offered─> GRANTED
    receiver (decode)     CONNECTING ─connected─> READY ─granted─> GRANTED ─chunk─> STREAMING ─last─> DONE
                          GRANTED, STREAMING ─failed─> FENCING ─fenced─> FAILED

Any live state goes to FAILED on a failure; only a receiver that has granted pages
passes through FENCING first: a write may still be on its way, and its pages may
not be used again before the writer has said that it stopped, or is gone.

Two rules: an event that does not fit raises and changes nothing; a terminal state
is never left, whatever arrives late.
"""

from __future__ import annotations

from enum import Enum, auto


class SenderState(Enum):
    ABSENT = auto()
    """Neither side has spoken of the room."""
    OFFERED = auto()
    """Prefill has the request; decode has not said where its pages shall go."""
    RESERVED = auto()
    """Decode has said where; prefill has not got the request yet."""
    GRANTED = auto()
    """Both: prefill may compute and send."""
    STREAMING = auto()
    """At least one chunk is queued or written, more will come."""
    LANDING = auto()
    """All is queued or written; decode has not acknowledged it."""
    DONE = auto()
    FAILED = auto()


class ReceiverState(Enum):
    CONNECTING = auto()
    READY = auto()
    """The prefill worker is connected and its pages fit."""
    GRANTED = auto()
    """It knows where to write."""
    STREAMING = auto()
    FENCING = auto()
    """Failed, but a write may still land: the pages may not be used yet."""
    DONE = auto()
    """Every page landed and the acknowledgement is on its way."""
    FAILED = auto()


class Event(Enum):
    OFFERED = auto()
    CONNECTED = auto()
    GRANTED = auto()
    CHUNK = auto()
    LAST = auto()
    ACKED = auto()
    FAILED = auto()
    """This side gave up, or a deadline passed; the other side may not know yet."""
    STOPPED = auto()
    """The other side writes no more: it said so, or its connection is gone."""


SENDER: dict[tuple[SenderState, Event], SenderState] = {
    (SenderState.ABSENT, Event.OFFERED): SenderState.OFFERED,
    (SenderState.ABSENT, Event.GRANTED): SenderState.RESERVED,
    (SenderState.OFFERED, Event.GRANTED): SenderState.GRANTED,
    (SenderState.RESERVED, Event.OFFERED): SenderState.GRANTED,
    (SenderState.GRANTED, Event.CHUNK): SenderState.STREAMING,
    (SenderState.GRANTED, Event.LAST): SenderState.LANDING,
    (SenderState.STREAMING, Event.CHUNK): SenderState.STREAMING,
    (SenderState.STREAMING, Event.LAST): SenderState.LANDING,
    (SenderState.LANDING, Event.ACKED): SenderState.DONE,
} | {
    (state, event): SenderState.FAILED
    for state in SenderState
    if state not in (SenderState.DONE, SenderState.FAILED)
    for event in (Event.FAILED, Event.STOPPED)
}

RECEIVER: dict[tuple[ReceiverState, Event], ReceiverState] = {
    (ReceiverState.CONNECTING, Event.CONNECTED): ReceiverState.READY,
    (ReceiverState.READY, Event.GRANTED): ReceiverState.GRANTED,
    (ReceiverState.GRANTED, Event.CHUNK): ReceiverState.STREAMING,
    (ReceiverState.GRANTED, Event.LAST): ReceiverState.DONE,
    (ReceiverState.STREAMING, Event.CHUNK): ReceiverState.STREAMING,
    (ReceiverState.STREAMING, Event.LAST): ReceiverState.DONE,
    (ReceiverState.CONNECTING, Event.FAILED): ReceiverState.FAILED,
    (ReceiverState.READY, Event.FAILED): ReceiverState.FAILED,
    (ReceiverState.GRANTED, Event.FAILED): ReceiverState.FENCING,
    (ReceiverState.STREAMING, Event.FAILED): ReceiverState.FENCING,
    (ReceiverState.FENCING, Event.FAILED): ReceiverState.FENCING,
    (ReceiverState.FENCING, Event.CHUNK): ReceiverState.FENCING,
    (ReceiverState.FENCING, Event.LAST): ReceiverState.FENCING,
} | {
    (state, Event.STOPPED): ReceiverState.FAILED
    for state in ReceiverState
    if state not in (ReceiverState.DONE, ReceiverState.FAILED)
}

TERMINAL: frozenset[SenderState | ReceiverState] = frozenset(
    {SenderState.DONE, SenderState.FAILED, ReceiverState.DONE, ReceiverState.FAILED}
)


class IllegalEvent(Exception):
    """A message that does not fit the state of its hand-off: the peer broke the protocol."""


def next_sender(state: SenderState, event: Event) -> SenderState:
    """The state after `event`; terminal states stay. Raises IllegalEvent."""
    if state in TERMINAL:
        return state
    try:
        return SENDER[state, event]
    except KeyError:
        raise IllegalEvent(f"sender: wanted an event that fits {state.name}, found {event.name}") from None


def next_receiver(state: ReceiverState, event: Event) -> ReceiverState:
    """The state after `event`; terminal states stay. Raises IllegalEvent."""
    if state in TERMINAL:
        return state
    try:
        return RECEIVER[state, event]
    except KeyError:
        raise IllegalEvent(f"receiver: wanted an event that fits {state.name}, found {event.name}") from None
