"""One hand-off as a state table, once for each side: what happens, and what has to be done about it.

    sender (prefill)      ABSENT ─offered─> OFFERED ─granted─> GRANTED ─chunk─> STREAMING ─last─> LANDING ─acked─> DONE
                          ABSENT ─granted─> RESERVED ─offered─> GRANTED
    receiver (decode)     CONNECTING ─connected─> READY ─granted─> GRANTED ─coming─> STREAMING
                          STREAMING ─last─> LANDING ─landed─> DONE
                          GRANTED, STREAMING, LANDING ─failed─> STOPPING ─stopped─> FENCING ─clear─> FAILED

A sender that fails is over at once: what it writes meanwhile lands in pages that decode still
holds back. A receiver that has granted pages is not: STOPPING waits for the writer's word that
it writes no more, FENCING for the transport's that nothing of it is still on the way. Where the
connection is lost there is no such word, and the transport alone has to make sure.

Three rules: an event that does not fit raises and changes nothing; DONE and FAILED are never
left, whatever arrives late; and only in them are a receiver's pages free.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple


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
    """It writes."""
    LANDING = auto()
    """It wrote everything; some of it may still be on the way."""
    STOPPING = auto()
    """Failed, and the writer has not said yet that it stopped: the pages may not be used."""
    FENCING = auto()
    """Failed, and the writer stopped or is lost, but what it wrote may still be on the way: the same."""
    DONE = auto()
    """Every page landed and the acknowledgement is on its way."""
    FAILED = auto()


class Event(Enum):
    OFFERED = auto()
    """Prefill's scheduler has the request."""
    CONNECTED = auto()
    REPLACED = auto()
    """The prefill worker that answers is another life of it than the one that the request is bound for."""
    GRANTED = auto()
    CHUNK = auto()
    """Prefill's scheduler has computed a chunk."""
    COMING = auto()
    """Decode hears that a chunk is about to be written."""
    LAST = auto()
    LANDED = auto()
    """The transport has all pages in place."""
    ACKED = auto()
    FAILED = auto()
    """This side gave up, or a deadline passed; the other side may not know yet."""
    STOPPED = auto()
    """The other side's word: it gave up, or heard that this side did."""
    LOST = auto()
    """The connection is gone."""
    CLEAR = auto()
    """The transport's word: nothing can land any more."""


class Act(Enum):
    """What a side does about an event."""

    SAY_GRANT = auto()
    SAY_STOP = auto()
    SAY_STOPPED = auto()
    """Behind every write that was begun: the word that decode relies on."""
    SAY_ACK = auto()
    AWAIT_LANDED = auto()
    """Ask the transport for LANDED."""
    FENCE = auto()
    """Ask the transport for CLEAR. After LOST the end of the whole connection brings it."""


class SenderStep(NamedTuple):
    state: SenderState
    act: Act | None = None


class ReceiverStep(NamedTuple):
    state: ReceiverState
    act: Act | None = None


SENDER: dict[tuple[SenderState, Event], SenderStep] = {
    (SenderState.ABSENT, Event.OFFERED): SenderStep(SenderState.OFFERED),
    (SenderState.ABSENT, Event.GRANTED): SenderStep(SenderState.RESERVED),
    (SenderState.ABSENT, Event.FAILED): SenderStep(SenderState.FAILED),
    (SenderState.OFFERED, Event.GRANTED): SenderStep(SenderState.GRANTED),
    (SenderState.OFFERED, Event.FAILED): SenderStep(SenderState.FAILED),
    (SenderState.RESERVED, Event.OFFERED): SenderStep(SenderState.GRANTED),
    (SenderState.GRANTED, Event.CHUNK): SenderStep(SenderState.STREAMING),
    (SenderState.GRANTED, Event.LAST): SenderStep(SenderState.LANDING),
    (SenderState.STREAMING, Event.CHUNK): SenderStep(SenderState.STREAMING),
    (SenderState.STREAMING, Event.LAST): SenderStep(SenderState.LANDING),
    (SenderState.LANDING, Event.ACKED): SenderStep(SenderState.DONE),
    # Late, and answered all the same: decode waits for these words.
    (SenderState.DONE, Event.GRANTED): SenderStep(SenderState.DONE, Act.SAY_STOP),
    (SenderState.FAILED, Event.GRANTED): SenderStep(SenderState.FAILED, Act.SAY_STOP),
    (SenderState.DONE, Event.STOPPED): SenderStep(SenderState.DONE, Act.SAY_STOPPED),
    (SenderState.FAILED, Event.STOPPED): SenderStep(SenderState.FAILED, Act.SAY_STOPPED),
}
_SENDER_LIVE = (
    SenderState.ABSENT,
    SenderState.OFFERED,
    SenderState.RESERVED,
    SenderState.GRANTED,
    SenderState.STREAMING,
    SenderState.LANDING,
)
for _live in _SENDER_LIVE:
    SENDER[_live, Event.STOPPED] = SenderStep(SenderState.FAILED, Act.SAY_STOPPED)
    SENDER[_live, Event.LOST] = SenderStep(SenderState.FAILED)
    SENDER.setdefault((_live, Event.FAILED), SenderStep(SenderState.FAILED, Act.SAY_STOP))

RECEIVER: dict[tuple[ReceiverState, Event], ReceiverStep] = {
    (ReceiverState.CONNECTING, Event.CONNECTED): ReceiverStep(ReceiverState.READY),
    (ReceiverState.CONNECTING, Event.REPLACED): ReceiverStep(ReceiverState.FAILED),
    (ReceiverState.CONNECTING, Event.FAILED): ReceiverStep(ReceiverState.FAILED),
    (ReceiverState.CONNECTING, Event.LOST): ReceiverStep(ReceiverState.FAILED),
    (ReceiverState.READY, Event.GRANTED): ReceiverStep(ReceiverState.GRANTED, Act.SAY_GRANT),
    (ReceiverState.READY, Event.FAILED): ReceiverStep(ReceiverState.FAILED, Act.SAY_STOP),
    (ReceiverState.READY, Event.STOPPED): ReceiverStep(ReceiverState.FAILED),
    (ReceiverState.READY, Event.LOST): ReceiverStep(ReceiverState.FAILED),
    (ReceiverState.GRANTED, Event.COMING): ReceiverStep(ReceiverState.STREAMING),
    (ReceiverState.STREAMING, Event.COMING): ReceiverStep(ReceiverState.STREAMING),
    (ReceiverState.GRANTED, Event.LAST): ReceiverStep(ReceiverState.LANDING, Act.AWAIT_LANDED),
    (ReceiverState.STREAMING, Event.LAST): ReceiverStep(ReceiverState.LANDING, Act.AWAIT_LANDED),
    (ReceiverState.LANDING, Event.LANDED): ReceiverStep(ReceiverState.DONE, Act.SAY_ACK),
    (ReceiverState.STOPPING, Event.STOPPED): ReceiverStep(ReceiverState.FENCING, Act.FENCE),
    (ReceiverState.STOPPING, Event.LOST): ReceiverStep(ReceiverState.FENCING),
    (ReceiverState.FENCING, Event.CLEAR): ReceiverStep(ReceiverState.FAILED),
}
for _granted in (ReceiverState.GRANTED, ReceiverState.STREAMING, ReceiverState.LANDING):
    RECEIVER[_granted, Event.FAILED] = ReceiverStep(ReceiverState.STOPPING, Act.SAY_STOP)
    RECEIVER[_granted, Event.STOPPED] = ReceiverStep(ReceiverState.FENCING, Act.FENCE)
    RECEIVER[_granted, Event.LOST] = ReceiverStep(ReceiverState.FENCING)
for _event in (Event.COMING, Event.LAST, Event.LANDED, Event.FAILED):
    RECEIVER[ReceiverState.STOPPING, _event] = ReceiverStep(ReceiverState.STOPPING)
for _event in (Event.COMING, Event.LAST, Event.LANDED, Event.FAILED, Event.STOPPED, Event.LOST):
    RECEIVER[ReceiverState.FENCING, _event] = ReceiverStep(ReceiverState.FENCING)

TERMINAL: frozenset[SenderState | ReceiverState] = frozenset(
    {SenderState.DONE, SenderState.FAILED, ReceiverState.DONE, ReceiverState.FAILED}
)


class IllegalEvent(Exception):
    """A message that does not fit the state of its hand-off: the peer broke the protocol."""


def next_sender(state: SenderState, event: Event) -> SenderStep:
    """The step that `event` causes; terminal states stay. Raises IllegalEvent."""
    step = SENDER.get((state, event))
    if step is not None:
        return step
    if state in TERMINAL:
        return SenderStep(state)
    raise IllegalEvent(f"sender: wanted an event that fits {state.name}, found {event.name}")


def next_receiver(state: ReceiverState, event: Event) -> ReceiverStep:
    """The step that `event` causes; terminal states stay. Raises IllegalEvent."""
    step = RECEIVER.get((state, event))
    if step is not None:
        return step
    if state in TERMINAL:
        return ReceiverStep(state)
    raise IllegalEvent(f"receiver: wanted an event that fits {state.name}, found {event.name}")
