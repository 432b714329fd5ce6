"""Hand-off sessions: in every interleaving of whatever can happen, they end, and no page is free too early.

`World` is both sides of one hand-off of two chunks, what is on its way between them, and the
memory. `explore` visits every state that it can get into: aborts on either side at any moment,
deadlines, lost connections that each side notices when it does, a prefill process that freezes
and goes on, or is killed and replaced by another life. The tables are the product's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.session import (
    TERMINAL,
    Act,
    Event,
    IllegalEvent,
    ReceiverState,
    ReceiverStep,
    SenderState,
    next_receiver,
    next_sender,
)

CHUNKS = 2


@dataclass(frozen=True)
class Sends:
    """A write of one chunk, or a word; a writer's jobs and a connection's messages are made of these."""

    what: str
    chunk: int = 0


@dataclass(frozen=True)
class World:
    one_sided: bool
    """The writer writes decode's memory itself (shm); else decode's own threads do (tcp)."""
    sender: SenderState = SenderState.ABSENT
    receiver: ReceiverState = ReceiverState.CONNECTING
    computed: int = 0
    granted_here: bool = False
    """Whether prefill has the grant, and so knows whom to tell."""
    jobs: tuple[Sends, ...] = ()
    writing: Sends | None = None
    to_receiver: tuple[str, ...] = ()
    to_sender: tuple[str, ...] = ()
    flying: frozenset[int] = frozenset()
    """Chunks that a two-sided transport has sent, and decode has not read."""
    reading: frozenset[int] = frozenset()
    """Chunks that decode's threads are reading into its pages."""
    over: bool = False
    """Decode's threads begin to read nothing more under this tag."""
    landed: frozenset[int] = frozenset()
    landing: bool = False
    """Decode's transport was asked for LANDED …"""
    fencing: bool = False
    """… for CLEAR under this tag …"""
    clearing: bool = False
    """… and for CLEAR after the connection was lost."""
    leave: bool = True
    """Whether the writer may write (transfer/lease.py)."""
    sender_up: bool = True
    receiver_up: bool = True
    """Whether this side still takes the connection for alive."""
    frozen: bool = False
    dead: bool = False
    aborts: int = 2
    freezes: int = 1


NextReceiver = Callable[[ReceiverState, Event], ReceiverStep]


class PageOverwritten(Exception):
    """A write landed in a page that decode's pool had back."""


def steps(world: World, next_for_receiver: NextReceiver) -> Iterator[World]:
    """Every state that may come next. Raises PageOverwritten."""
    yield from _prefill(world)
    yield from _memory(world)
    yield from _decode(world, next_for_receiver)
    cut = not (world.sender_up and world.receiver_up)
    if world.sender_up and not world.frozen and not world.dead and (cut or world.aborts):
        lost = replace(world, sender_up=False, jobs=(), writing=None, to_sender=())
        yield _sender(lost, Event.LOST)
    if world.receiver_up and (cut or world.aborts or world.frozen or world.dead):
        lost = replace(world, receiver_up=False, to_receiver=(), leave=False, clearing=True)
        yield _receiver(lost, Event.LOST, next_for_receiver)


def _prefill(world: World) -> Iterator[World]:
    if world.dead:
        return
    if world.freezes:
        yield replace(world, dead=True, jobs=(), writing=None, sender_up=False, to_sender=(), freezes=0)
    if world.frozen:
        yield replace(world, frozen=False)
        return
    if world.freezes:
        yield replace(world, frozen=True, freezes=0)
    if world.sender in (SenderState.ABSENT, SenderState.RESERVED):
        yield _sender(world, Event.OFFERED)
    if world.sender in (SenderState.GRANTED, SenderState.STREAMING):
        chunk = world.computed + 1
        job = Sends("write", chunk)
        event = Event.LAST if chunk == CHUNKS else Event.CHUNK
        yield _sender(replace(world, computed=chunk, jobs=(*world.jobs, job)), event)
    if world.sender not in TERMINAL and world.aborts:
        yield _sender(replace(world, aborts=world.aborts - 1), Event.FAILED)
    if world.sender_up and world.to_sender:
        word, *rest = world.to_sender
        heard = replace(world, to_sender=tuple(rest))
        if word == "grant":
            yield _sender(replace(heard, granted_here=True), Event.GRANTED)
        else:
            yield _sender(heard, Event.STOPPED if word == "stop" else Event.ACKED)
    yield from _writer(world)


def _writer(world: World) -> Iterator[World]:
    if world.writing is None and world.jobs and world.sender_up:
        job, *rest = world.jobs
        taken = replace(world, jobs=tuple(rest))
        if job.what != "write":
            yield _say(taken, job.what)
        elif world.sender in TERMINAL:
            yield taken
        elif world.one_sided and not world.leave:
            yield _sender(replace(taken, sender_up=False, jobs=(), to_sender=()), Event.LOST)
        else:
            yield _say(replace(taken, writing=job), "chunk")
    if world.writing is not None:
        done = replace(world, writing=None)
        if not world.one_sided:
            done = replace(done, flying=done.flying | {world.writing.chunk})
        if world.writing.chunk == CHUNKS and world.sender not in TERMINAL:
            done = _say(done, "last")
        yield done


def _memory(world: World) -> Iterator[World]:
    """Bytes arrive in decode's pages."""
    if world.one_sided and world.writing is not None and not world.frozen and not world.dead:
        yield _land(world, world.writing.chunk)
    for chunk in world.flying:
        rest = replace(world, flying=world.flying - {chunk})
        yield rest if world.over else replace(rest, reading=world.reading | {chunk})
    for chunk in world.reading:
        yield _land(replace(world, reading=world.reading - {chunk}), chunk)


def _land(world: World, chunk: int) -> World:
    if world.receiver is ReceiverState.FAILED or (world.receiver is ReceiverState.DONE and chunk not in world.landed):
        raise PageOverwritten(str(world))
    return replace(world, landed=world.landed | {chunk})


def _decode(world: World, next_for_receiver: NextReceiver) -> Iterator[World]:
    def step(changed: World, event: Event) -> World:
        return _receiver(changed, event, next_for_receiver)

    if world.receiver is ReceiverState.CONNECTING:
        if world.receiver_up:
            yield step(world, Event.CONNECTED)
        if world.dead:
            yield step(world, Event.REPLACED)
    if world.receiver is ReceiverState.READY:
        yield step(world, Event.GRANTED)
    live = world.receiver not in TERMINAL
    if live and world.aborts:
        yield step(replace(world, aborts=world.aborts - 1), Event.FAILED)
    if world.receiver_up and world.to_receiver:
        word, *rest = world.to_receiver
        heard = replace(world, to_receiver=tuple(rest))
        events = {"chunk": Event.COMING, "last": Event.LAST, "stop": Event.STOPPED, "stopped": Event.STOPPED}
        yield step(heard, events[word])
    if world.landing and (world.one_sided or len(world.landed) == CHUNKS):
        yield step(replace(world, landing=False), Event.LANDED)
    if (world.fencing or world.clearing) and not world.over:
        yield replace(world, over=True)
    if world.fencing and world.over and not world.reading:
        yield step(replace(world, fencing=False), Event.CLEAR)
    # The connection is lost: decode closes its own sockets, and of a writer it waits for the lock.
    if world.clearing and world.over and not world.reading and not (world.one_sided and world.writing is not None):
        yield step(replace(world, clearing=False, flying=frozenset()), Event.CLEAR)


def _say(world: World, word: str) -> World:
    return replace(world, to_receiver=(*world.to_receiver, word)) if world.receiver_up else world


def _sender(world: World, event: Event) -> World:
    state, act = next_sender(world.sender, event)
    world = replace(world, sender=state)
    if act is not None and world.sender_up and (world.granted_here or event is Event.STOPPED):
        word = "stop" if act is Act.SAY_STOP else "stopped"
        return replace(world, jobs=(*world.jobs, Sends(word)))
    return world


def _receiver(world: World, event: Event, next_for_receiver: NextReceiver) -> World:
    if world.receiver in TERMINAL:  # Forgotten: nothing is asked of the table any more.
        return world
    state, act = next_for_receiver(world.receiver, event)
    world = replace(world, receiver=state)
    said = {Act.SAY_GRANT: "grant", Act.SAY_STOP: "stop", Act.SAY_ACK: "ack"}
    if act in said:
        return replace(world, to_sender=(*world.to_sender, said[act])) if world.sender_up else world
    if act is Act.AWAIT_LANDED:
        return replace(world, landing=True)
    if act is Act.FENCE:
        return replace(world, fencing=True)
    return world


def explore(one_sided: bool, next_for_receiver: NextReceiver) -> list[World]:
    """Every state that the world can get into. Raises what any of them raises."""
    first = World(one_sided)
    seen, todo = {first}, [first]
    while todo:
        world = todo.pop()
        for after in steps(world, next_for_receiver):
            if after not in seen:
                seen.add(after)
                todo.append(after)
    return list(seen)


@pytest.mark.parametrize("one_sided", [True, False], ids=["shm", "tcp"])
def test_in_every_interleaving_no_write_lands_in_a_free_page_and_every_hand_off_can_end(one_sided: bool) -> None:
    worlds = explore(one_sided, next_receiver)

    assert len(worlds) > 5_000
    for world in worlds:
        if all(after == world for after in steps(replace(world, aborts=max(world.aborts, 1)), next_receiver)):
            assert world.receiver in TERMINAL, world
            assert world.sender in TERMINAL or world.dead, world


def _without(before: ReceiverState, event: Event) -> NextReceiver:
    """The receiver's table without the wait that this step begins."""

    def step(state: ReceiverState, happened: Event) -> ReceiverStep:
        if (state, happened) == (before, event):
            return ReceiverStep(ReceiverState.FAILED)
        return next_receiver(state, happened)

    return step


@pytest.mark.parametrize(
    ("one_sided", "before", "event"),
    [
        (True, ReceiverState.GRANTED, Event.FAILED),
        (True, ReceiverState.STREAMING, Event.FAILED),
        (True, ReceiverState.STREAMING, Event.LOST),
        (True, ReceiverState.STOPPING, Event.LOST),
        (True, ReceiverState.STOPPING, Event.FAILED),
        (False, ReceiverState.STREAMING, Event.FAILED),
        (False, ReceiverState.STREAMING, Event.STOPPED),
        (False, ReceiverState.STOPPING, Event.STOPPED),
        (False, ReceiverState.STREAMING, Event.LOST),
    ],
)
def test_without_any_of_its_waits_a_page_is_overwritten(one_sided: bool, before: ReceiverState, event: Event) -> None:
    with pytest.raises(PageOverwritten):
        explore(one_sided, _without(before, event))


events = st.lists(st.sampled_from(Event), max_size=12)


@given(events)
def test_a_failure_ends_any_sender_and_nothing_moves_it_again(before: list[Event]) -> None:
    state = SenderState.ABSENT
    for event in before:
        try:
            state = next_sender(state, event).state
        except IllegalEvent:
            continue

    ended = next_sender(state, Event.FAILED).state

    assert ended in TERMINAL
    assert all(next_sender(ended, event).state is ended for event in Event)


@given(events)
def test_a_lost_connection_and_a_clear_transport_end_any_receiver(before: list[Event]) -> None:
    state = ReceiverState.CONNECTING
    for event in before:
        try:
            state = next_receiver(state, event).state
        except IllegalEvent:
            continue

    lost = next_receiver(state, Event.LOST).state

    assert next_receiver(lost, Event.CLEAR).state in TERMINAL


def test_success_needs_the_receivers_acknowledgement() -> None:
    state = SenderState.ABSENT
    for event in (Event.OFFERED, Event.GRANTED, Event.CHUNK, Event.LAST):
        state = next_sender(state, event).state

    assert state is SenderState.LANDING
    assert next_sender(state, Event.ACKED).state is SenderState.DONE


def test_a_late_stop_is_always_answered() -> None:
    for state in SenderState:
        assert next_sender(state, Event.STOPPED).act is Act.SAY_STOPPED


def test_either_side_may_speak_first() -> None:
    offered_first = next_sender(next_sender(SenderState.ABSENT, Event.OFFERED).state, Event.GRANTED).state
    granted_first = next_sender(next_sender(SenderState.ABSENT, Event.GRANTED).state, Event.OFFERED).state

    assert offered_first is granted_first is SenderState.GRANTED


def test_an_event_that_does_not_fit_says_which_and_where() -> None:
    with pytest.raises(IllegalEvent, match="sender: wanted an event that fits OFFERED, found ACKED"):
        next_sender(SenderState.OFFERED, Event.ACKED)
    with pytest.raises(IllegalEvent, match="receiver: wanted an event that fits CONNECTING, found LAST"):
        next_receiver(ReceiverState.CONNECTING, Event.LAST)
