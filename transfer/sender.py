"""Prefill's side of every hand-off: it listens, is told where pages shall go, writes them there.

    scheduler's thread          the courier's thread
    offer(room)            ──>
                           <──  Grant arrives: state is GRANTED
    ahead(rooms, pages)    ──>  where the route can: what is computed leaves at once, what a pass computes when that is
                                nearly over, and the GPU writes it once it is there; nobody is told
    send(room, pages)      ──>  queued to the peer's writer: Chunk is said, the pages are written, or confirmed
    send(room, …, aux)     ──>  … then Last is said
                           <──  Ack arrives: state is DONE

A peer's writer does one thing at a time, in order, but for the answer to a Stop: that waits until what was begun before
it is over, while others' pages go on. It stands in the queue behind all writes of its room, and one that comes later
finds that the room has ended: so none follows its Stopped.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from transfer import handoff
from transfer.auth import ClusterKey
from transfer.computed import Computed
from transfer.connection import Connection, PeerLost
from transfer.courier import Courier
from transfer.deadlines import Deadlines
from transfer.exchange import exchange
from transfer.handshake import Identity, admit, reach
from transfer.lanes import ParkedLanes
from transfer.mark import POLL_S, Mark
from transfer.plan import Pages, check_range
from transfer.pool import Pool
from transfer.session import TERMINAL, Act, Event, IllegalEvent, SenderState, next_sender
from transfer.transport import Route, RouteLost, Transport

log = logging.getLogger(__name__)

ACCEPT_AGAIN_S = 0.1
MAX_STRANGERS = 64
"""Connections that have not proved yet that they hold the cluster's key. One more costs the oldest its place."""
SOON_S = 1e-3
"""Between two looks at whether a pass is nearly computed: each takes the interpreter from the scheduler."""
_NOT_AHEAD = -1
_OVER = TERMINAL | {SenderState.ABSENT}


@dataclass(frozen=True)
class _Write:
    """Pages of one chunk; the last one brings the auxiliary rows."""

    room: int
    source: Pages
    first: int
    aux: list[bytes] | None
    after: Mark | None


@dataclass(frozen=True)
class Going:
    """Pages of one room that may leave while a pass computes the last of them.

    pages  indices into this worker's pool, the prompt's first ones, also those that decode holds already
    fresh  so many of them, the last ones, are computed by the pass; those before were by earlier ones
    """

    room: int
    pages: Pages
    fresh: int

    @property
    def early(self) -> Going:
        """Those that are computed already."""
        return Going(self.room, self.pages[: len(self.pages) - self.fresh], 0)

    def behind(self, held: int) -> Going:
        """All but the first ones."""
        pages = self.pages[held:]
        return Going(self.room, pages, min(self.fresh, len(pages)))


@dataclass(frozen=True)
class _PartAhead:
    """Of one room: its pages from the granted one of this index on."""

    room: int
    source: Pages
    first: int
    fresh: int


@dataclass(frozen=True)
class _WriteAhead:
    """What leaves for one peer while a pass is computed: all of it together, or the first layer of one request would
    wait for the last layer of another."""

    parts: list[_PartAhead]
    computed: Computed


@dataclass(frozen=True)
class _Say:
    message: handoff.Message


class _Outgoing:
    """One room, as prefill sees it. Changed under the sender's lock only."""

    def __init__(self, now_s: float, queue_s: float) -> None:
        self.state = SenderState.ABSENT
        self.peer: _Peer | None = None
        self.pages: Pages = np.empty(0, np.int32)
        self.prefix_tokens = 0
        self.queued_pages = 0
        self.ahead: Pages = np.empty(0, np.int32)
        """This side's page that was written ahead to each of `pages`."""
        self.ahead_pages = 0
        """Up to which."""
        self.confirmed_pages = 0
        """Of those, the ones that were the same when they were sent."""
        self.sent_bytes = 0
        self.writing_s = 0.0
        self.granted_s = now_s
        self.computing_s = 0.0
        """From the grant until the last pages were there to be sent."""
        self.reason = ""
        self.deadline_s = now_s + queue_s
        self.began_s = now_s
        self.ended_s: float | None = None
        self.released = True
        """Whether nobody on this side asks for it (any more): only then may it be forgotten."""


class _Peer:
    """One decode worker that is connected."""

    def __init__(self, hello: handoff.Hello, connection: Connection, transport: str, route: Route) -> None:
        self.name = hello.worker
        self.epoch = hello.epoch
        self.layout = hello.layout
        self.connection = connection
        self.transport = transport
        self.route = route
        self.jobs: asyncio.Queue[_Write | _WriteAhead | _Say] = asyncio.Queue()
        self.unsaid: list[handoff.Message] = []
        """What waits until all that was begun is over."""
        self.saying = False
        """Whether somebody sees to that."""


class Sender:
    """Listens for decode workers and writes pages to them. Methods may be called from any thread; none waits."""

    def __init__(
        self,
        pool: Pool,
        key: ClusterKey,
        *,
        worker: str,
        epoch: int,
        transports: Sequence[Transport],
        deadlines: Deadlines,
        on_change: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """on_change: told whenever a room has come to another state, from any thread; it may not wait"""
        self._me = Identity(worker, epoch, key, pool.layout)
        self._transports = transports
        self._deadlines = deadlines
        self._on_change = on_change
        self._clock = clock
        self._lock = threading.Lock()
        self._rooms: dict[int, _Outgoing] = {}
        self._strangers: dict[Connection, None] = {}
        """Oldest first."""
        self._lanes = ParkedLanes(2 * deadlines.connect_s, clock)
        self._courier = Courier(f"handoff-sender-{worker}")

    def listen(self, host: str, port: int) -> int:
        """Starts to listen; port 0 takes a free one. Returns the port. Raises OSError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
        listener.setblocking(False)
        self._courier.call(lambda: self._courier.spawn(self._accept(listener)))
        self._courier.call(lambda: self._courier.spawn(self._sweep()))
        bound: int = listener.getsockname()[1]
        return bound

    def close(self) -> None:
        self._courier.close()
        self._lanes.close()

    # What the scheduler's thread calls.

    def offer(self, room: int) -> bool:
        """This worker has the request of this room. False: another request has it, or had it just now.

        A room that decode gave up before it was offered is accepted, and has failed.
        """
        with self._lock:
            outgoing = self._room(room)
            if not outgoing.released or outgoing.state is SenderState.DONE:
                return False
            self._step(room, outgoing, Event.OFFERED)
            outgoing.released = False
            return True

    def ahead(self, going: Sequence[Going], computed: Computed) -> None:
        """Lets pages of one forward pass leave while it computes them, where a route can do that; else nothing happens.

        Whoever calls this sends the same pages later. One that is another by then is written again: the cache may have
        found that it held the same tokens already. Those that have left already are left out.

        computed  when the pass's layers are; a room that is granted before it is soon over may still go ahead
        """
        if computed.soon is None or computed.soon.reached():
            self._let_go(going, computed)
            return
        self._let_go([one.early for one in going], computed)
        self._courier.call(lambda: self._courier.spawn(self._let_go_soon(going, computed)))

    def _let_go(self, going: Sequence[Going], computed: Computed) -> None:
        with self._lock:
            parts: dict[_Peer, list[_PartAhead]] = {}
            for one in going:
                outgoing = self._rooms.get(one.room)
                if outgoing is None or outgoing.state not in (SenderState.GRANTED, SenderState.STREAMING):
                    continue
                assert outgoing.peer is not None, "a granted room has a peer"
                # What decode holds already is not granted.
                one = one.behind(outgoing.prefix_tokens // self._me.layout.page_tokens)
                start, end = max(outgoing.ahead_pages, outgoing.queued_pages), len(one.pages)
                if outgoing.peer.route.ahead is None or not start < end <= len(outgoing.pages):
                    continue
                source = np.asarray(one.pages[start:], np.int32)
                try:
                    check_range(source, self._me.layout.pages)
                except ValueError:
                    continue  # Whoever sends them fails the room, and says why.
                outgoing.ahead[start:end] = source
                outgoing.ahead_pages = end
                part = _PartAhead(one.room, source, start, min(one.fresh, end - start))
                parts.setdefault(outgoing.peer, []).append(part)
            for peer, of_peer in parts.items():
                self._courier.call(peer.jobs.put_nowait, _WriteAhead(of_peer, computed))

    def goes_ahead(self, room: int) -> bool:
        """Whether `ahead` would do anything for this room, now or once it is granted."""
        with self._lock:
            outgoing = self._rooms.get(room)
            if outgoing is None or outgoing.state in TERMINAL:
                return False
            return outgoing.peer is None or outgoing.peer.route.ahead is not None

    def send(self, room: int, pages: Pages, aux: list[bytes] | None = None, after: Mark | None = None) -> None:
        """Queues these pages of the pool, next in the prompt's order; `aux` makes it the last chunk.

        pages  indices into this worker's pool
        aux    the request's row of each auxiliary buffer, or None
        after  the pages are computed once this has been reached; None: they are now
        """
        with self._lock:
            outgoing = self._rooms.get(room)
            if outgoing is None or outgoing.state in TERMINAL:
                return
            if outgoing.queued_pages + len(pages) > len(outgoing.pages):
                wanted, found = len(outgoing.pages), outgoing.queued_pages + len(pages)
                self._fail(room, outgoing, f"pages: wanted at most the {wanted} granted ones, found {found}")
                return
            write = _Write(room, np.asarray(pages, np.int32), outgoing.queued_pages, aux, after)
            try:
                check_range(write.source, self._me.layout.pages)
                self._step(room, outgoing, Event.CHUNK if aux is None else Event.LAST)
            except (ValueError, IllegalEvent) as error:
                self._fail(room, outgoing, str(error))
                return
            outgoing.queued_pages += len(pages)
            outgoing.computing_s = self._clock() - outgoing.granted_s
            assert outgoing.peer is not None, "a granted room has a peer"
            self._courier.call(outgoing.peer.jobs.put_nowait, write)

    def fail(self, room: int, reason: str) -> None:
        """This side gives the room up; decode is told."""
        with self._lock:
            outgoing = self._rooms.get(room)
            if outgoing is not None and outgoing.state not in TERMINAL:
                self._fail(room, outgoing, reason)

    def forget(self, room: int) -> None:
        """The scheduler is done with the room. A live one fails; an ended one is remembered for late messages."""
        with self._lock:
            outgoing = self._rooms.get(room)
            if outgoing is None:
                return
            if outgoing.state not in TERMINAL:
                self._fail(room, outgoing, "prefill gave the request up")
            outgoing.released = True
            outgoing.ended_s = self._clock()

    def state(self, room: int) -> SenderState:
        outgoing = self._rooms.get(room)
        return outgoing.state if outgoing is not None else SenderState.ABSENT

    def prefix_tokens(self, room: int) -> int:
        """Tokens at the prompt's start that decode holds already; 0 where it has not said so (yet)."""
        outgoing = self._rooms.get(room)
        return outgoing.prefix_tokens if outgoing is not None else 0

    def reason(self, room: int) -> str:
        """Why the room failed; empty where it did not."""
        outgoing = self._rooms.get(room)
        return outgoing.reason if outgoing is not None else ""

    def sent_bytes(self, room: int) -> int:
        outgoing = self._rooms.get(room)
        return outgoing.sent_bytes if outgoing is not None else 0

    @property
    def rooms(self) -> int:
        """Rooms that are not over, or that the scheduler has not let go of; not those that are only remembered."""
        with self._lock:
            return sum(outgoing.ended_s is None or not outgoing.released for outgoing in self._rooms.values())

    # State, always under the lock.

    def _room(self, room: int) -> _Outgoing:
        outgoing = self._rooms.get(room)
        if outgoing is None:
            outgoing = self._rooms[room] = _Outgoing(self._clock(), self._deadlines.queue_s)
        return outgoing

    def _step(self, room: int, outgoing: _Outgoing, event: Event, speaker: _Peer | None = None) -> None:
        """speaker: whose message it was; what has to be said about it is said to that one. Raises IllegalEvent."""
        before = outgoing.state
        step = next_sender(before, event)
        outgoing.state = step.state
        if step.state is not before and self._on_change is not None:
            self._on_change()
        if step.state in TERMINAL and outgoing.ended_s is None:
            outgoing.ended_s = self._clock()
        listener = speaker or outgoing.peer
        if step.act is None or listener is None:
            return
        answer: handoff.Message = handoff.Stopped(room)
        if step.act is Act.SAY_STOP:
            answer = handoff.Stop(room, outgoing.reason or "the room has ended")
        self._courier.call(listener.jobs.put_nowait, _Say(answer))

    def _fail(self, room: int, outgoing: _Outgoing, reason: str) -> None:
        outgoing.reason = reason
        self._step(room, outgoing, Event.FAILED)

    # The courier's thread.

    async def _let_go_soon(self, going: Sequence[Going], computed: Computed) -> None:
        """What is sent before that does not go ahead."""
        assert computed.soon is not None, "that is what is waited for"
        while not computed.soon.reached():
            await asyncio.sleep(SOON_S)
            if all(self.state(one.room) in _OVER for one in going):
                return
        self._let_go(going, computed)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    sock, _address = await loop.sock_accept(listener)
                except OSError as error:
                    # Out of descriptors, or gone before it was taken: the next one may be luckier.
                    log.warning("hand-off connection not accepted: %s", error)
                    await asyncio.sleep(ACCEPT_AGAIN_S)
                    continue
                self._courier.spawn(self._serve(sock))
        finally:
            listener.close()

    async def _serve(self, sock: socket.socket) -> None:
        try:
            connection = Connection(sock, self._deadlines.connect_s)
        except OSError:  # Gone already.
            sock.close()
            return
        if len(self._strangers) >= MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.cut()
        self._strangers[connection] = None
        try:
            peer = await self._greet(connection)
        except (PeerLost, TimeoutError) as error:
            log.warning("hand-off connection refused: %s", error or "no handshake in time")
            connection.close()
            return
        except BaseException:
            connection.close()
            raise
        if peer is not None:
            await self._stay(peer)

    async def _greet(self, connection: Connection) -> _Peer | None:
        """The decode worker that is there; None for a lane, which is parked. Raises PeerLost, TimeoutError."""
        async with asyncio.timeout(self._deadlines.connect_s):
            try:
                guest = await admit(connection, self._me)
            finally:
                self._strangers.pop(connection, None)
            if isinstance(guest, handoff.Lane):
                self._lanes.park(guest.token, connection.detach())
                return None
            transport, route = await reach(connection, self._me, guest, self._transports, self._lanes)
            return _Peer(guest.hello, connection, transport, route)

    async def _stay(self, peer: _Peer) -> None:
        """One connection's life, whatever ends it."""
        log.info("decode worker connected worker=%s epoch=%d transport=%s", peer.name, peer.epoch, peer.transport)
        reason = "this side failed"
        try:
            take = functools.partial(self._take, peer)
            reason = await exchange(peer.connection, self._courier, self._deadlines, self._write(peer), take)
        finally:
            log.info("decode worker lost worker=%s epoch=%d reason=%s", peer.name, peer.epoch, reason)
            self._lose(peer, f"lost decode worker {peer.name}: {reason}")
            peer.connection.close()
            await peer.route.disconnect()

    def _take(self, peer: _Peer, message: handoff.Message) -> None:
        with self._lock:
            self._understand(peer, message)

    def _understand(self, peer: _Peer, message: handoff.Message) -> None:
        """Under the lock. Raises ValueError, IllegalEvent."""
        match message:
            case handoff.Grant(room):
                self._granted(peer, room, message)
            case handoff.Ack(room):
                outgoing = self._rooms.get(room)
                if outgoing is None or outgoing.peer is not peer:
                    raise ValueError(f"room: wanted one that worker {peer.name} granted, found {room}")
                self._step(room, outgoing, Event.ACKED)
            case handoff.Stop(room, reason):
                self._stop(peer, room, reason)
            case handoff.Ping() | handoff.Stopped():
                pass
            case _:
                raise ValueError(f"message: wanted Grant, Ack, Stop or Ping, found {type(message).__name__}")

    def _granted(self, peer: _Peer, room: int, grant: handoff.Grant) -> None:
        pages = np.frombuffer(grant.pages, np.dtype("<i4"))
        check_range(pages, peer.layout.pages)
        page_tokens = self._me.layout.page_tokens
        if grant.prefix_tokens < 0 or grant.prefix_tokens % page_tokens:
            raise ValueError(f"prefix_tokens: wanted whole pages of {page_tokens}, found {grant.prefix_tokens}")
        outgoing = self._room(room)
        ended = outgoing.state in TERMINAL
        if not ended and outgoing.peer is not None and outgoing.peer is not peer:
            peer.jobs.put_nowait(_Say(handoff.Stop(room, f"decode worker {outgoing.peer.name} has this room")))
            return
        # Nothing is taken of a grant that may not be; and whoever sees the state sees all that belongs to it, as states
        # are read without the lock.
        next_sender(outgoing.state, Event.GRANTED)
        if not ended:
            outgoing.peer, outgoing.pages, outgoing.prefix_tokens = peer, pages, grant.prefix_tokens
            outgoing.ahead = np.full(len(pages), _NOT_AHEAD, np.int32)
            outgoing.granted_s = self._clock()
            outgoing.deadline_s = outgoing.granted_s + self._deadlines.handoff_s
        self._step(room, outgoing, Event.GRANTED, peer)

    def _stop(self, peer: _Peer, room: int, reason: str) -> None:
        outgoing = self._room(room)
        if outgoing.peer is not None and outgoing.peer is not peer:
            # It is another's; this one wrote, and will write, nothing for it.
            peer.jobs.put_nowait(_Say(handoff.Stopped(room)))
            return
        outgoing.reason = outgoing.reason or f"decode worker {peer.name}: {reason}"
        self._step(room, outgoing, Event.STOPPED, peer)

    async def _write(self, peer: _Peer) -> None:
        """Does the peer's jobs, in order."""
        try:
            while True:
                job = await peer.jobs.get()
                if isinstance(job, _Say):
                    peer.unsaid.append(job.message)
                    if not peer.saying:
                        # Not here: what was begun may end with a whole forward pass, and others' pages need not wait.
                        peer.saying = True
                        self._courier.spawn(self._say(peer))
                elif isinstance(job, _WriteAhead):
                    await self._write_ahead(peer, job)
                else:
                    await self._write_chunk(peer, job)
        except (PeerLost, RouteLost) as error:
            log.info("write failed worker=%s reason=%s", peer.name, error)
        finally:
            # Whatever ended it: a connection on which nobody writes is none.
            peer.connection.cut()

    async def _say(self, peer: _Peer) -> None:
        """Behind all that was begun: what is said so is that this side has stopped, or will not go on."""
        try:
            while peer.unsaid:
                messages, peer.unsaid = peer.unsaid, []
                await peer.route.settled()
                await peer.connection.send(*messages)
            peer.saying = False
        except (PeerLost, RouteLost) as error:
            log.info("not said worker=%s reason=%s", peer.name, error)
        finally:
            if peer.saying:
                # Decode waits for these words.
                peer.connection.cut()

    async def _write_ahead(self, peer: _Peer, write: _WriteAhead) -> None:
        early: list[tuple[Pages, Pages]] = []
        fresh: list[tuple[Pages, Pages]] = []
        for part in write.parts:
            outgoing = self._rooms.get(part.room)
            if outgoing is None or outgoing.state in TERMINAL:
                continue
            destination = outgoing.pages[part.first : part.first + len(part.source)]
            edge = len(part.source) - part.fresh
            early.append((part.source[:edge], destination[:edge]))
            fresh.append((part.source[edge:], destination[edge:]))
        if early:
            assert peer.route.ahead is not None, "looked at before this was queued"
            source, destination = (np.concatenate(side) for side in zip(*early, *fresh, strict=True))
            await peer.route.ahead.write_ahead(source, destination, sum(len(one) for one, _ in fresh), write.computed)

    async def _write_chunk(self, peer: _Peer, write: _Write) -> None:
        outgoing = self._rooms.get(write.room)
        while outgoing is not None and outgoing.state not in TERMINAL and write.after and not write.after.reached():
            await asyncio.sleep(POLL_S)
        if outgoing is None or outgoing.state in TERMINAL:
            return
        chunk: list[handoff.Message] = [handoff.Chunk(write.room, len(write.source))] if len(write.source) else []
        if chunk and peer.route.landing_is_polled:
            await peer.connection.send(*chunk)
            chunk = []
        if not await self._write_pages(peer, outgoing, write):
            return
        if write.aux is not None:
            pages = write.first + len(write.source)
            chunk.append(
                handoff.Last(
                    room=write.room,
                    pages=pages,
                    rows=write.aux,
                    writing_s=outgoing.writing_s,
                    ahead_pages=outgoing.confirmed_pages,
                    computing_s=outgoing.computing_s,
                )
            )
        if chunk:
            await peer.connection.send(*chunk)

    async def _write_pages(self, peer: _Peer, outgoing: _Outgoing, write: _Write) -> bool:
        """In slices, those that were not written ahead; the others are confirmed. False: the room ended meanwhile."""
        granted = slice(write.first, write.first + len(write.source))
        source, destination = write.source, outgoing.pages[granted]
        there = outgoing.ahead[granted] == source
        confirmed = int(np.count_nonzero(there))
        if confirmed:
            source, destination = source[~there], destination[~there]
        ahead = peer.route.ahead if outgoing.ahead_pages else None
        write_pages = peer.route.write if ahead is None else ahead.write_again
        slice_pages = max(1, peer.route.slice_bytes // self._me.layout.bytes_per_page)
        for start in range(0, len(source), slice_pages):
            if outgoing.state in TERMINAL:
                return False
            end = start + slice_pages
            began_s = self._clock()
            await write_pages(write.room, write.first + start, source[start:end], destination[start:end])
            outgoing.writing_s += self._clock() - began_s
            outgoing.sent_bytes += len(source[start:end]) * self._me.layout.bytes_per_page
        if confirmed:
            assert ahead is not None, "it has written them"
            await ahead.confirm(write.room, confirmed)
            outgoing.confirmed_pages += confirmed
            outgoing.sent_bytes += confirmed * self._me.layout.bytes_per_page
        return outgoing.state not in TERMINAL

    def _lose(self, peer: _Peer, reason: str) -> None:
        with self._lock:
            for room, outgoing in self._rooms.items():
                if outgoing.peer is peer and outgoing.state not in TERMINAL:
                    outgoing.reason = reason
                    self._step(room, outgoing, Event.LOST)

    async def _sweep(self) -> None:
        """Fails rooms whose deadline passed, and forgets those that ended long ago."""
        while True:
            await asyncio.sleep(self._deadlines.ping_s)
            self._lanes.sweep()
            now_s = self._clock()
            with self._lock:
                for room, outgoing in list(self._rooms.items()):
                    if outgoing.ended_s is not None:
                        if outgoing.released and now_s - outgoing.ended_s > self._deadlines.memory_s:
                            del self._rooms[room]
                    elif now_s > outgoing.deadline_s:
                        waited = f"{now_s - outgoing.began_s:.1f} s"
                        self._fail(room, outgoing, f"hand-off not over after {waited}, in {outgoing.state.name}")
