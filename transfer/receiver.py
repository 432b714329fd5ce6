"""Decode's side of every hand-off: it connects, says where pages shall land, acknowledges them.

    scheduler's thread              the courier's thread
    open(room, host, port)     ──>  one connection for each prefill worker, made when first needed
                               <──  connected and its pages fit: state is READY
    grant(room, pages, row)    ──>  Grant is said
                               <──  Last arrives, all pages are in place, rows written: Ack is said, state is DONE
    fail(room, reason)         ──>  Stop is said; STOPPING until Stopped, FENCING until nothing can land, then FAILED

A lost connection fails its rooms at once, and is made anew for the next request: nothing
remembers that the peer once failed.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import socket
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from transfer import handoff
from transfer.auth import ClusterKey
from transfer.connection import Connection, PeerLost
from transfer.courier import Courier
from transfer.deadlines import Deadlines
from transfer.ended import Ended
from transfer.exchange import exchange
from transfer.handshake import Identity, introduce, offer, open_lane
from transfer.mark import POLL_S, Mark
from transfer.plan import Pages, check_range
from transfer.pool import Pool
from transfer.session import TERMINAL, Act, Event, IllegalEvent, ReceiverState, next_receiver
from transfer.transport import Landing, RouteLost, Transport

log = logging.getLogger(__name__)

Address = tuple[str, int]


class _Incoming:
    """One room, as decode sees it. Changed under the receiver's lock only."""

    def __init__(self, address: Address, epoch: int | None, now_s: float, connect_s: float) -> None:
        self.state = ReceiverState.CONNECTING
        self.address = address
        self.epoch = epoch
        self.peer: _Peer | None = None
        self.pages: Pages = np.empty(0, np.int32)
        self.prefix_tokens = 0
        self.aux_row = 0
        self.rows: list[bytes] = []
        self.writing_s = 0.0
        self.ahead_pages = 0
        self.coming_pages = 0
        self.granted_s = now_s
        self.last_s = now_s
        """When prefill had said its last word, after which only pages are waited for."""
        self.computing_s = 0.0
        self.reason = ""
        self.began_s = now_s
        self.deadline_s: float | None = now_s + connect_s
        self.released = False
        """Whether the scheduler is done with it."""


class _Peer:
    """One prefill worker that is connected."""

    def __init__(self, address: Address, welcome: handoff.Welcome, connection: Connection) -> None:
        self.address = address
        self.name = welcome.worker
        self.epoch = welcome.epoch
        self.connection = connection
        self.outbox: asyncio.Queue[handoff.Message] = asyncio.Queue()
        self.transport: str
        self.landing: Landing


class _Wire:
    """What a landing may ask of its peer's connection (transfer.transport.Wire)."""

    def __init__(self, peer: _Peer, key: ClusterKey, deadlines: Deadlines, courier: Courier) -> None:
        self._peer = peer
        self._key = key
        self._deadlines = deadlines
        self._courier = courier

    async def dial(self, token: bytes) -> socket.socket:
        deadlines = self._deadlines
        try:
            lane = await Connection.connect(*self._peer.address, deadlines.connect_s)
        except PeerLost as error:
            raise RouteLost(str(error)) from error
        try:
            await open_lane(lane, self._key, token)
            return lane.detach()
        except PeerLost as error:
            lane.close()
            raise RouteLost(str(error)) from error
        except BaseException:
            lane.close()
            raise

    def broken(self, reason: str) -> None:
        log.info("transport broken worker=%s reason=%s", self._peer.name, reason)
        self._courier.call(self._peer.connection.cut)


class Receiver:
    """Takes pages from any prefill worker of the cluster. Methods may be called from any thread; none waits."""

    def __init__(
        self,
        pool: Pool,
        aux: Pool,
        key: ClusterKey,
        *,
        worker: str,
        epoch: int,
        transports: Sequence[Transport],
        deadlines: Deadlines,
        on_end: Callable[[Ended], None] | None = None,
        on_change: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        on_end     told of every room's end, on the courier's thread
        on_change  told whenever a room has come to another state, from any thread; it may not wait
        """
        self._me = Identity(worker, epoch, key, pool.layout)
        self._aux = aux
        self._transports = transports
        self._deadlines = deadlines
        self._on_end = on_end
        self._on_change = on_change
        self._clock = clock
        self._lock = threading.Lock()
        self._rooms: dict[int, _Incoming] = {}
        self._peers: dict[Address, _Peer] = {}
        self._connecting: set[Address] = set()
        self._courier = Courier(f"handoff-receiver-{worker}")
        self._courier.call(lambda: self._courier.spawn(self._sweep()))

    def close(self) -> None:
        self._courier.close()

    # What the scheduler's thread calls.

    def open(self, room: int, host: str, port: int, epoch: int | None = None) -> bool:
        """A request will get its pages from the prefill worker at this address. False: another request has the room.

        epoch  the life of that worker for which the request is bound; another one fails it. None: any
        """
        with self._lock:
            if room in self._rooms:
                return False
            self._rooms[room] = _Incoming((host, port), epoch, self._clock(), 2 * self._deadlines.connect_s)
        self._courier.call(self._attach, room)
        return True

    def grant(self, room: int, pages: Pages, aux_row: int, prefix_tokens: int, after: Mark | None = None) -> None:
        """The request's pages shall land here.

        pages          indices into this worker's pool, in the order of the prompt
        aux_row        row of the auxiliary buffers
        prefix_tokens  tokens at the prompt's start that are here already; `pages` begin after them
        after          nothing may land in them before this has been reached; None: it may now

        Does nothing for a room that has failed meanwhile: its state says so. Raises ValueError for a page that is none.
        """
        pages = np.array(pages, np.dtype("<i4"))
        check_range(pages, self._me.layout.pages)
        with self._lock:
            incoming = self._rooms.get(room)
            if incoming is None or incoming.state in TERMINAL:
                return
            incoming.pages, incoming.aux_row, incoming.prefix_tokens = pages, aux_row, prefix_tokens
            incoming.deadline_s = self._clock() + self._deadlines.handoff_s
            if after is None or after.reached():
                self._granted(room, incoming)
            else:
                self._courier.call(lambda: self._courier.spawn(self._grant_after(after, room, incoming)))

    def fail(self, room: int, reason: str) -> None:
        """This side gives the room up. Its pages may be used again once the state is FAILED, not before."""
        with self._lock:
            incoming = self._rooms.get(room)
            if incoming is not None and incoming.state not in TERMINAL:
                self._fail(room, incoming, reason)

    def forget(self, room: int) -> None:
        """The scheduler is done with the room: it is gone as soon as no write can land in it."""
        with self._lock:
            incoming = self._rooms.get(room)
            if incoming is None:
                return
            incoming.released = True
            if incoming.state not in TERMINAL:
                self._fail(room, incoming, "decode gave the request up")
            if incoming.state in TERMINAL:
                del self._rooms[room]

    def state(self, room: int) -> ReceiverState:
        """FAILED for a room that is not known (any more)."""
        incoming = self._rooms.get(room)
        return incoming.state if incoming is not None else ReceiverState.FAILED

    def reason(self, room: int) -> str:
        """Why the room failed; empty where it did not."""
        incoming = self._rooms.get(room)
        return incoming.reason if incoming is not None else ""

    @property
    def rooms(self) -> int:
        """Rooms that are not over, or that the scheduler has not let go of."""
        return len(self._rooms)

    # State, always under the lock.

    def _step(self, room: int, incoming: _Incoming, event: Event) -> None:
        """Raises IllegalEvent."""
        before = incoming.state
        step = next_receiver(before, event)
        incoming.state = step.state
        if step.state is not before and self._on_change is not None:
            self._on_change()
        if step.state in TERMINAL and before not in TERMINAL and self._on_end is not None:
            self._courier.call(self._on_end, self._account(room, incoming))
        peer = incoming.peer
        if step.act is None or peer is None:
            return
        match step.act:
            case Act.SAY_GRANT:
                self._courier.call(self._expect, peer, room, incoming.pages, incoming.prefix_tokens)
            case Act.SAY_STOP:
                self._courier.call(peer.outbox.put_nowait, handoff.Stop(room, incoming.reason))
            case Act.SAY_ACK:
                self._courier.call(peer.outbox.put_nowait, handoff.Ack(room))
            case Act.AWAIT_LANDED if peer.landing.in_place(room):
                self._landed(room, incoming)
            case Act.AWAIT_LANDED:
                self._courier.call(lambda: self._courier.spawn(self._land(peer, room, incoming)))
            case Act.FENCE:
                self._courier.call(lambda: self._courier.spawn(self._fence(peer, room, incoming)))

    def _fail(self, room: int, incoming: _Incoming, reason: str, event: Event = Event.FAILED) -> None:
        incoming.reason = incoming.reason or reason
        if incoming.state not in (ReceiverState.STOPPING, ReceiverState.FENCING):
            incoming.deadline_s = self._clock() + self._deadlines.fence_s
        self._step(room, incoming, event)

    def _account(self, room: int, incoming: _Incoming) -> Ended:
        peer, done = incoming.peer, incoming.state is ReceiverState.DONE
        return Ended(
            room=room,
            prefill=peer.name if peer else "",
            transport=peer.transport if peer else "",
            pages=len(incoming.pages),
            moved_bytes=len(incoming.pages) * self._me.layout.bytes_per_page if done else 0,
            prefix_tokens=incoming.prefix_tokens,
            took_s=self._clock() - incoming.began_s,
            reason=incoming.reason,
            writing_s=incoming.writing_s if done else 0.0,
            ahead_pages=incoming.ahead_pages if done else 0,
            opening_s=incoming.granted_s - incoming.began_s if done else 0.0,
            computing_s=incoming.computing_s if done else 0.0,
        )

    # The courier's thread.

    def _attach(self, room: int) -> None:
        """Gives the room its peer, or starts to connect to it."""
        with self._lock:
            incoming = self._rooms.get(room)
            if incoming is None or incoming.state is not ReceiverState.CONNECTING:
                return
            peer = self._peers.get(incoming.address)
            # The router may know of a later life than the one that is connected here: then that is looked for.
            if peer is not None and (incoming.epoch is None or incoming.epoch <= peer.epoch):
                self._connected(room, incoming, peer)
                return
            address = incoming.address
        if address not in self._connecting:
            self._connecting.add(address)
            self._courier.spawn(self._follow(address))

    def _connected(self, room: int, incoming: _Incoming, peer: _Peer) -> None:
        """Under the lock."""
        if incoming.epoch is not None and incoming.epoch != peer.epoch:
            reason = f"prefill worker {peer.name} was restarted: wanted epoch {incoming.epoch}, found {peer.epoch}"
            self._fail(room, incoming, reason, Event.REPLACED)
            return
        incoming.peer, incoming.deadline_s = peer, None
        self._step(room, incoming, Event.CONNECTED)

    async def _follow(self, address: Address) -> None:
        """One connection's life, from the first attempt to its end, whatever ends it."""
        reason = "this side failed"
        try:
            peer = await self._connect(address)
            reason = ""
        except (PeerLost, RouteLost, TimeoutError) as error:
            reason = str(error) or f"no handshake within {self._deadlines.connect_s:g} s"
            log.warning("prefill worker not reached address=%s:%d reason=%s", *address, reason)
            return
        finally:
            self._connecting.discard(address)
            if reason:
                self._not_reached(address, f"cannot reach the prefill worker at {address[0]}:{address[1]}: {reason}")
        await self._stay(peer)

    async def _connect(self, address: Address) -> _Peer:
        deadlines = self._deadlines
        connection = await Connection.connect(*address, deadlines.connect_s)
        try:
            async with asyncio.timeout(deadlines.connect_s):
                welcome = await introduce(connection, self._me, self._transports)
                peer = _Peer(address, welcome, connection)
                wire = _Wire(peer, self._me.key, deadlines, self._courier)
                peer.transport, peer.landing, why = await offer(connection, welcome, self._transports, wire)
        except BaseException:
            connection.close()
            raise
        log.info(
            "connected to prefill worker worker=%s epoch=%d transport=%s%s",
            peer.name,
            peer.epoch,
            peer.transport,
            f" because {why}" if why else "",
        )
        return peer

    async def _stay(self, peer: _Peer) -> None:
        with self._lock:
            before = self._peers.get(peer.address)
            for room, incoming in self._waiting(peer.address):
                self._connected(room, incoming, peer)
            if before is None or before.epoch < peer.epoch:
                self._peers[peer.address] = peer
        if before is not None:
            if self._peers[peer.address] is before:
                await self._part(peer, "no later life than the one that is connected")
                return
            before.connection.cut()
        reason = "this side failed"
        try:
            take = functools.partial(self._take, peer)
            reason = await exchange(peer.connection, self._courier, self._deadlines, self._write(peer), take)
        finally:
            log.warning("prefill worker lost worker=%s epoch=%d reason=%s", peer.name, peer.epoch, reason)
            await self._part(peer, reason)

    async def _part(self, peer: _Peer, reason: str) -> None:
        """Ends a connection, and its rooms as soon as none of it can land any more."""
        peer.connection.close()
        with self._lock:
            if self._peers.get(peer.address) is peer:
                del self._peers[peer.address]
            self._tell(peer, Event.LOST, f"lost prefill worker {peer.name}: {reason}")
        await peer.landing.disconnect()
        with self._lock:
            self._tell(peer, Event.CLEAR, "")

    async def _write(self, peer: _Peer) -> None:
        try:
            while True:
                messages = [await peer.outbox.get()]
                while not peer.outbox.empty():
                    messages.append(peer.outbox.get_nowait())
                await peer.connection.send(*messages)
        except PeerLost as error:
            log.info("write failed worker=%s reason=%s", peer.name, error)
        finally:
            # Whatever ended it: a connection on which nobody writes is none.
            peer.connection.cut()

    def _take(self, peer: _Peer, message: handoff.Message) -> None:
        with self._lock:
            self._understand(peer, message)

    def _understand(self, peer: _Peer, message: handoff.Message) -> None:
        """Under the lock. Raises ValueError, IllegalEvent."""
        match message:
            case handoff.Ping():
                return
            case handoff.Chunk() | handoff.Last() | handoff.Stop() | handoff.Stopped():
                room = message.room
            case _:
                raise ValueError(f"message: wanted Chunk, Last, Stop or Ping, found {type(message).__name__}")
        incoming = self._rooms.get(room)
        if incoming is None or incoming.peer is not peer or incoming.state in TERMINAL:
            return  # Over, or forgotten; or never this peer's, and then nothing of it is changed.
        match message:
            case handoff.Chunk(_, count):
                incoming.coming_pages += count
                self._step(room, incoming, Event.COMING)
                peer.landing.coming(room)
            case handoff.Last():
                self._last(room, incoming, message)
            case handoff.Stop(_, reason):
                self._fail(room, incoming, f"prefill worker {peer.name}: {reason}", Event.STOPPED)
            case handoff.Stopped():
                self._step(room, incoming, Event.STOPPED)

    def _last(self, room: int, incoming: _Incoming, last: handoff.Last) -> None:
        if tuple(map(len, last.rows)) != self._aux.layout.page_bytes:
            found = ", ".join(str(len(row)) for row in last.rows)
            raise ValueError(f"last: wanted rows of {self._aux.layout.page_bytes} bytes, found {found}")
        if not 0 <= last.writing_s < math.inf:
            raise ValueError(f"last: wanted seconds of writing, found {last.writing_s}")
        if not 0 <= last.computing_s < math.inf:
            raise ValueError(f"last: wanted seconds of computing, found {last.computing_s}")
        if not 0 <= last.ahead_pages <= last.pages:
            raise ValueError(f"last: wanted at most {last.pages} pages that went ahead, found {last.ahead_pages}")
        if not last.pages == incoming.coming_pages == len(incoming.pages):
            granted, found_pages = len(incoming.pages), f"{last.pages} written of {incoming.coming_pages} announced"
            self._fail(room, incoming, f"pages: wanted {granted}, found {found_pages}")
            return
        incoming.rows, incoming.writing_s, incoming.ahead_pages = last.rows, last.writing_s, last.ahead_pages
        incoming.last_s, incoming.computing_s = self._clock(), last.computing_s
        self._step(room, incoming, Event.LAST)

    async def _grant_after(self, mark: Mark, room: int, incoming: _Incoming) -> None:
        """Until then the room is what it was: one that fails meanwhile has named no page to anybody."""
        while not mark.reached():
            if incoming.state in TERMINAL:
                return
            await asyncio.sleep(POLL_S)
        with self._lock:
            if self._rooms.get(room) is incoming and incoming.state not in TERMINAL:
                self._granted(room, incoming)

    def _granted(self, room: int, incoming: _Incoming) -> None:
        """Under the lock."""
        incoming.granted_s = self._clock()
        try:
            self._step(room, incoming, Event.GRANTED)
        except IllegalEvent as error:
            self._fail(room, incoming, str(error))

    def _expect(self, peer: _Peer, room: int, pages: Pages, prefix_tokens: int) -> None:
        peer.landing.expect(room, pages)
        peer.outbox.put_nowait(handoff.Grant(room, pages.tobytes(), prefix_tokens))

    async def _land(self, peer: _Peer, room: int, incoming: _Incoming) -> None:
        try:
            await peer.landing.landed(room)
        except RouteLost:
            return  # Fenced meanwhile, or the connection ends: that tells the room.
        with self._lock:
            self._landed(room, incoming)

    def _landed(self, room: int, incoming: _Incoming) -> None:
        """Under the lock."""
        if incoming.state is ReceiverState.LANDING:
            # A route that only begins a write when it is told to is written to until now.
            incoming.writing_s += self._clock() - incoming.last_s
            for view, row in zip(self._aux.views([(incoming.aux_row, 1)]), incoming.rows, strict=True):
                view[:] = row
        self._step(room, incoming, Event.LANDED)

    async def _fence(self, peer: _Peer, room: int, incoming: _Incoming) -> None:
        await peer.landing.fence(room)
        with self._lock:
            self._step(room, incoming, Event.CLEAR)
            self._drop_released(room, incoming)

    def _waiting(self, address: Address) -> list[tuple[int, _Incoming]]:
        """Rooms that wait for a connection to this address. Under the lock."""
        return [
            (room, incoming)
            for room, incoming in self._rooms.items()
            if incoming.address == address and incoming.state is ReceiverState.CONNECTING
        ]

    def _not_reached(self, address: Address, reason: str) -> None:
        with self._lock:
            for room, incoming in self._waiting(address):
                self._fail(room, incoming, reason, Event.LOST)

    def _tell(self, peer: _Peer, event: Event, reason: str) -> None:
        """Every room of a peer that is lost. Under the lock."""
        for room, incoming in list(self._rooms.items()):
            if incoming.peer is peer and incoming.state not in TERMINAL:
                self._fail(room, incoming, reason, event)
                self._drop_released(room, incoming)

    def _drop_released(self, room: int, incoming: _Incoming) -> None:
        if incoming.released and incoming.state in TERMINAL:
            self._rooms.pop(room, None)

    async def _sweep(self) -> None:
        """Fails rooms whose deadline passed; cuts a connection that does not answer a Stop."""
        while True:
            await asyncio.sleep(self._deadlines.ping_s)
            now_s = self._clock()
            with self._lock:
                for room, incoming in list(self._rooms.items()):
                    if incoming.state in TERMINAL:
                        self._drop_released(room, incoming)
                    elif incoming.deadline_s is not None and now_s > incoming.deadline_s:
                        self._overdue(room, incoming, now_s)

    def _overdue(self, room: int, incoming: _Incoming, now_s: float) -> None:
        if incoming.state in (ReceiverState.STOPPING, ReceiverState.FENCING):
            assert incoming.peer is not None, "a fencing room has a peer"
            incoming.peer.connection.cut()
        else:
            waited = f"{now_s - incoming.began_s:.1f} s"
            self._fail(room, incoming, f"hand-off not over after {waited}, in {incoming.state.name}")
