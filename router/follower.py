"""Follow the workers' page events into the index.

For each worker one task, one SUB socket on what it publishes and one DEALER socket
for questions; `router.sequence` decides what to apply and what to ask, `router.audit`
whether what was applied is right. What a decode worker says of hand-offs that ended
comes over the same SUB socket and is passed on. The task lives from the worker's first
registration in an epoch until the worker is lost, leaves or is replaced, and its pages
are forgotten then.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import zmq
import zmq.asyncio

from router.audit import Audits
from router.fleet import Fleet
from router.index import Index
from router.mirror import Mirror
from router.sequence import Step
from transfer.auth import ClusterKey
from transfer.ended import Ended
from transfer.undecodable import UNDECODABLE
from transfer.wire import (
    Audit,
    Batch,
    PageMessage,
    Published,
    Registration,
    decode_page_message,
    decode_published,
    encode,
)

log = logging.getLogger(__name__)

TICK_S = 0.2
"""How often time is looked at while nothing comes."""
RECEIVE_HIGH_WATER = 100_000
"""Batches that wait in a socket before it drops some; a drop is seen as a gap."""
TURN_MESSAGES = 64
"""Messages taken from a socket before requests get their turn again."""
CLOSE_S = 2.0
AUDIT_SHARE = 0.02
"""Of this process's time, what audits may take: with many workers and many pages each is looked at less often."""
HEARTBEAT_S = 1.0
"""A connection without a sign of life for three times as long is dropped and made anew: TCP alone would wait on."""

Message = TypeVar("Message", PageMessage, Published)


@dataclass(frozen=True)
class _Feed:
    mirror: Mirror
    task: asyncio.Task[None]


@dataclass
class _Turn:
    """When the next audit of a worker is looked at."""

    next_s: float = -math.inf


class Follower:
    """Keeps `index` in step with the workers it is told to follow.

    clock_s      seconds of a steady clock
    handed_over  told of every hand-off that a decode worker says is over, with its name
    audits       what comparing samples with the workers came to
    """

    def __init__(
        self,
        key: ClusterKey,
        index: Index,
        fleet: Fleet,
        clock_s: Callable[[], float],
        handed_over: Callable[[str, Ended], None],
        audits: Audits,
    ) -> None:
        self._key = key
        self._index = index
        self._fleet = fleet
        self._clock_s = clock_s
        self._handed_over = handed_over
        self._audits = audits
        self._feeds: dict[str, _Feed] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # The process's own, never terminated: `router.gossip_link` says why.
        self._context = zmq.asyncio.Context.instance()

    async def close(self) -> None:
        """Stops following everybody."""
        for name in list(self._feeds):
            self.forget(name)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_S)

    def registered(self, registration: Registration) -> None:
        """Starts to follow this epoch of the worker, or takes note of how far it says it is."""
        feed = self._feeds.get(registration.worker)
        if feed is not None and (feed.task.done() or feed.mirror.sequence.epoch < registration.epoch):
            self.forget(registration.worker)
            feed = None
        if feed is None:
            feed = self._start(registration)
        if feed.mirror.sequence.epoch == registration.epoch:
            feed.mirror.sequence.announced(registration.sequence, registration.audit_s)

    def forget(self, name: str) -> None:
        """Stops following the worker and drops its pages."""
        feed = self._feeds.pop(name, None)
        if feed is not None:
            feed.task.cancel()
        self._index.forget(name)

    def _start(self, registration: Registration) -> _Feed:
        mirror = Mirror(registration.worker, registration.epoch, self._index, self._audits)
        task = asyncio.create_task(self._follow(registration, mirror), name=registration.worker)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        feed = _Feed(mirror, task)
        self._feeds[registration.worker] = feed
        return feed

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # The next registration starts it again, from nothing.
            log.error("feed ended worker=%s error=%r", task.get_name(), error)

    async def _follow(self, registration: Registration, mirror: Mirror) -> None:
        sequence, turn = mirror.sequence, _Turn()
        live, replay = self._context.socket(zmq.SUB), self._context.socket(zmq.DEALER)
        # The same sockets without futures: what has come already needs none to be read.
        said_live: zmq.Socket[bytes] = zmq.Socket.shadow(live)
        said_replay: zmq.Socket[bytes] = zmq.Socket.shadow(replay)
        try:
            for socket in (live, replay):
                self._key.secure_client(socket)
                socket.rcvhwm = RECEIVE_HIGH_WATER
                socket.heartbeat_ivl = int(1000 * HEARTBEAT_S)
                socket.heartbeat_timeout = socket.handshake_ivl = int(3000 * HEARTBEAT_S)
            # Subscribed before the question is asked: what is published meanwhile is buffered, not lost.
            live.subscribe(b"")
            live.connect(registration.events)
            replay.connect(registration.replay)
            poller = zmq.asyncio.Poller()
            poller.register(live, zmq.POLLIN)
            poller.register(replay, zmq.POLLIN)
            await self._take(mirror, sequence.start(self._clock_s()), replay)
            while True:
                readable = dict(await poller.poll(timeout=int(TICK_S * 1000)))
                for socket in readable:
                    if socket is live:
                        for said in self._received(mirror.worker, said_live, decode_published):
                            await self._take(mirror, self._heard(mirror, said, turn), replay)
                    else:
                        for part in self._received(mirror.worker, said_replay, decode_page_message):
                            await self._take(mirror, sequence.answered(part, self._clock_s()), replay)
                await self._take(mirror, sequence.tick(self._clock_s()), replay)
        finally:
            live.close(linger=0)
            replay.close(linger=0)

    def _received(self, name: str, socket: zmq.Socket[bytes], decode: Callable[[bytes], Message]) -> list[Message]:
        """What has arrived, TURN_MESSAGES at most. The payload is the last frame."""
        messages: list[Message] = []
        while len(messages) < TURN_MESSAGES:
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                message = decode(frames[-1])
            except UNDECODABLE as error:
                # Whatever it was is missing now, which the sequence will notice.
                log.warning("page message refused worker=%s bytes=%d error=%s", name, len(frames[-1]), error)
                continue
            if message.worker == name:
                messages.append(message)
            else:
                log.warning("page message of another worker wanted=%s found=%s", name, message.worker)
        return messages

    def _heard(self, mirror: Mirror, said: Published, turn: _Turn) -> Step:
        name, sequence, now_s = mirror.worker, mirror.sequence, self._clock_s()
        match said:
            case Batch():
                return sequence.live(said, now_s)
            case Audit():
                step = sequence.reached(said.epoch, said.sequence, now_s)
                if not 0 <= said.residue < said.modulus:
                    log.warning("audit refused worker=%s modulus=%d residue=%d", name, said.modulus, said.residue)
                elif now_s >= turn.next_s and sequence.stands_at(said.epoch, said.sequence):
                    return self._compare(mirror, said, turn, now_s)
                return step
        for ended in said.ended:
            self._handed_over(said.worker, ended)
        return Step()

    def _compare(self, mirror: Mirror, audit: Audit, turn: _Turn, now_s: float) -> Step:
        step = mirror.compared(audit, now_s)
        turn.next_s = now_s + (self._clock_s() - now_s) * len(self._feeds) / AUDIT_SHARE
        if step.ask is not None:
            agreement = self._audits[mirror.worker].agreement
            log.warning("pages differ worker=%s sequence=%d agreement=%.3f", mirror.worker, audit.sequence, agreement)
        return step

    async def _take(self, mirror: Mirror, step: Step, replay: zmq.asyncio.Socket) -> None:
        name = mirror.worker
        mirror.apply(step.events)
        worker = self._fleet.get(name)
        if worker is not None and worker.registration.epoch <= mirror.sequence.epoch and not worker.lost:
            worker.mode = mirror.mode(self._clock_s())
        if step.ask is not None:
            log.info("asking for pages worker=%s epoch=%d after=%d", name, step.ask.epoch, step.ask.sequence)
            try:
                await replay.send(encode(step.ask), zmq.NOBLOCK)
            except zmq.Again:
                log.warning("page request not sent worker=%s", name)
