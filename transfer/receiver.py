"""Decode's side of every hand-off: it connects, says where pages shall land, acknowledges them.

    scheduler's thread              the courier's thread
    open(room, host, port)     ──>  one connection for each prefill worker, made when first needed
                               <──  connected and its pages fit: state is READY
    grant(room, pages, row)    ──>  Grant is sent
                               <──  Last arrives, all pages counted, aux rows written: Ack is sent, state is DONE
    fail(room, reason)         ──>  Stop is sent; FENCING until Stopped, only then FAILED

A lost connection fails its rooms at once, and is made anew for the next request:
nothing remembers that the peer once failed.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import threading
import time
from collections.abc import Callable

import msgspec
import numpy as np

from transfer import handoff
from transfer.auth import ClusterKey
from transfer.connection import Connection, PeerLost
from transfer.courier import Courier
from transfer.deadlines import Deadlines
from transfer.plan import Pages, check_range, runs
from transfer.pool import Pool, SharedAddress
from transfer.session import TERMINAL, Event, IllegalEvent, ReceiverState, next_receiver

log = logging.getLogger(__name__)

Address = tuple[str, int]


class _Incoming:
    """One room, as decode sees it. Guarded by the receiver's lock."""

    def __init__(self, address: Address, now_s: float, connect_s: float) -> None:
        self.state = ReceiverState.CONNECTING
        self.address = address
        self.peer: _Peer | None = None
        self.pages: Pages = np.empty(0, np.int32)
        self.aux_row = 0
        self.landed_pages = 0
        self.reason = ""
        self.began_s = now_s
        self.deadline_s: float | None = now_s + connect_s
        self.released = False
        """Whether the scheduler is done with it."""


class _Peer:
    """One prefill worker that is connected."""

    def __init__(self, connection: Connection, welcome: handoff.Welcome) -> None:
        self.connection = connection
        self.name = welcome.worker
        self.epoch = welcome.epoch
        self.transport = welcome.transport
        self.outbox: asyncio.Queue[handoff.Message] = asyncio.Queue()


class Receiver:
    """Takes pages from any prefill worker of the cluster. Methods may be called from any thread; none waits."""

    def __init__(
        self,
        pool: Pool,
        aux: Pool,
        key: ClusterKey,
        *,
        shared: SharedAddress | None,
        worker: str,
        epoch: int,
        transports: tuple[str, ...],
        deadlines: Deadlines,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._aux = aux
        self._key = key
        self._shared = shared
        self._worker = worker
        self._epoch = epoch
        self._transports = transports
        self._deadlines = deadlines
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

    def open(self, room: int, host: str, port: int) -> bool:
        """A request will get its pages from the prefill worker at this address. False: another request has the room."""
        with self._lock:
            if room in self._rooms:
                return False
            self._rooms[room] = _Incoming((host, port), self._clock(), 2 * self._deadlines.connect_s)
        self._courier.call(self._attach, room)
        return True

    def grant(self, room: int, pages: Pages, aux_row: int, prefix_tokens: int) -> None:
        """The request's pages shall land here.

        pages          indices into this worker's pool, in the order of the prompt
        aux_row        row of the auxiliary buffers
        prefix_tokens  tokens at the prompt's start that are here already; `pages` begin after them

        Does nothing for a room that has failed meanwhile: its state says so. Raises ValueError for a page that is none.
        """
        pages = np.ascontiguousarray(pages, np.dtype("<i4"))
        check_range(pages, self._pool.layout.pages)
        with self._lock:
            incoming = self._rooms.get(room)
            if incoming is None or incoming.state in TERMINAL:
                return
            try:
                self._advance(room, Event.GRANTED)
            except IllegalEvent as error:
                self._fail(room, incoming, str(error))
                return
            incoming.pages, incoming.aux_row = pages, aux_row
            incoming.deadline_s = self._clock() + self._deadlines.handoff_s
            assert incoming.peer is not None, "a ready room has a peer"
            self._courier.call(incoming.peer.outbox.put_nowait, handoff.Grant(room, pages.tobytes(), prefix_tokens))

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
            if incoming.state in TERMINAL:
                del self._rooms[room]
            else:
                self._fail(room, incoming, "decode gave the request up")

    def state(self, room: int) -> ReceiverState:
        """FAILED for a room that is not known (any more)."""
        with self._lock:
            incoming = self._rooms.get(room)
            return incoming.state if incoming is not None else ReceiverState.FAILED

    def reason(self, room: int) -> str:
        """Why the room failed; empty where it did not."""
        with self._lock:
            incoming = self._rooms.get(room)
            return incoming.reason if incoming is not None else ""

    # State, always under the lock.

    def _advance(self, room: int, event: Event) -> _Incoming:
        incoming = self._rooms[room]
        incoming.state = next_receiver(incoming.state, event)
        return incoming

    def _fail(self, room: int, incoming: _Incoming, reason: str) -> None:
        incoming.reason = incoming.reason or reason
        self._advance(room, Event.FAILED)
        incoming.deadline_s = self._clock() + self._deadlines.fence_s
        if incoming.peer is not None:
            self._courier.call(incoming.peer.outbox.put_nowait, handoff.Stop(room, reason))

    # The courier's thread.

    def _attach(self, room: int) -> None:
        """Gives the room its peer, or starts to connect to it."""
        with self._lock:
            incoming = self._rooms.get(room)
            if incoming is None or incoming.state is not ReceiverState.CONNECTING:
                return
            peer = self._peers.get(incoming.address)
            if peer is not None:
                incoming.peer, incoming.deadline_s = peer, None
                self._advance(room, Event.CONNECTED)
                return
            address = incoming.address
        if address not in self._connecting:
            self._connecting.add(address)
            self._courier.spawn(self._follow(address))

    async def _follow(self, address: Address) -> None:
        """One connection's life, from the first attempt to its end, whatever ends it."""
        reason = "this side failed"
        try:
            peer = await self._connect(address)
            reason = ""
        except (PeerLost, TimeoutError) as error:
            reason = str(error) or f"no handshake within {self._deadlines.connect_s:g} s"
            log.warning("prefill worker not reached address=%s:%d reason=%s", *address, reason)
            return
        finally:
            self._connecting.discard(address)
            if reason:
                self._lose(address, f"cannot reach the prefill worker at {address[0]}:{address[1]}: {reason}")
        await self._stay(address, peer)

    async def _stay(self, address: Address, peer: _Peer) -> None:
        with self._lock:
            self._peers[address] = peer
            waiting = [room for room, incoming in self._rooms.items() if incoming.address == address]
        log.info("connected to prefill worker worker=%s epoch=%d transport=%s", peer.name, peer.epoch, peer.transport)
        for room in waiting:
            self._attach(room)
        writer = self._courier.spawn(self._write(peer))
        reason = "this side failed"
        try:
            await self._read(peer)
        except PeerLost as error:
            reason = str(error)
        finally:
            log.warning("prefill worker lost worker=%s epoch=%d reason=%s", peer.name, peer.epoch, reason)
            with self._lock:
                del self._peers[address]
            self._lose(address, f"lost prefill worker {peer.name}: {reason}")
            writer.cancel()
            peer.connection.close()

    async def _connect(self, address: Address) -> _Peer:
        deadlines = self._deadlines
        connection = await Connection.connect(*address, deadlines.connect_s, deadlines.silence_s)
        try:
            async with asyncio.timeout(deadlines.connect_s):
                return await self._handshake(connection)
        except (PeerLost, TimeoutError):
            connection.close()
            raise

    async def _handshake(self, connection: Connection) -> _Peer:
        challenge, _ = await connection.receive()
        if not isinstance(challenge, handoff.Challenge):
            raise PeerLost(f"handshake: wanted Challenge, found {type(challenge).__name__}")
        nonce = secrets.token_bytes(handoff.NONCE_BYTES)
        hello = handoff.Hello(
            version=handoff.VERSION,
            nonce=nonce,
            proof=b"",
            worker=self._worker,
            epoch=self._epoch,
            layout=self._pool.layout,
            transports=self._transports,
            shared=self._shared,
        )
        proof = self._key.mac("handoff-decode", challenge.nonce, nonce, hello.signed())
        await connection.send(msgspec.structs.replace(hello, proof=proof))
        answer, _ = await connection.receive()
        if isinstance(answer, handoff.Refused):
            raise PeerLost(f"refused: {answer.reason}")
        if not isinstance(answer, handoff.Welcome):
            raise PeerLost(f"handshake: wanted Welcome, found {type(answer).__name__}")
        if not hmac.compare_digest(self._key.mac("handoff-prefill", nonce, challenge.nonce), answer.proof):
            raise PeerLost("proof: wanted one made with this cluster's key")
        return _Peer(connection, answer)

    async def _write(self, peer: _Peer) -> None:
        try:
            while True:
                try:
                    async with asyncio.timeout(self._deadlines.ping_s):
                        message = await peer.outbox.get()
                except TimeoutError:
                    message = handoff.Ping()
                await peer.connection.send(message)
        except PeerLost as error:
            log.info("write failed worker=%s reason=%s", peer.name, error)
        finally:
            # Whatever ended it: a connection on which nobody writes is none.
            peer.connection.cut()

    async def _read(self, peer: _Peer) -> None:
        while True:
            message, payload_bytes = await peer.connection.receive()
            try:
                await self._take(peer, message, payload_bytes)
            except (IllegalEvent, ValueError) as error:
                raise PeerLost(str(error)) from error

    async def _take(self, peer: _Peer, message: handoff.Message, payload_bytes: int) -> None:
        match message:
            case handoff.Chunk(room, first, count):
                await self._chunk(peer, room, first, count, payload_bytes)
            case handoff.Last(room, pages):
                await self._last(peer, room, pages, payload_bytes)
            case handoff.Stop(room, reason):
                self._stopped(peer, room, f"prefill worker {peer.name}: {reason}")
                peer.outbox.put_nowait(handoff.Stopped(room))
            case handoff.Stopped(room):
                self._stopped(peer, room, "stopped")
            case handoff.Ping():
                pass
            case _:
                raise PeerLost(f"message: wanted Chunk, Last, Stop or Ping, found {type(message).__name__}")

    async def _chunk(self, peer: _Peer, room: int, first: int, count: int, payload_bytes: int) -> None:
        incoming = self._granted_to(peer, room)
        if incoming is None:
            await peer.connection.receive_bytes(payload_bytes)
            return
        pages = incoming.pages[first : first + count]
        if len(pages) != count or first != incoming.landed_pages:
            raise ValueError(f"chunk: wanted pages from {incoming.landed_pages} on, found {count} from {first}")
        if peer.transport == "tcp":
            if payload_bytes != count * self._pool.layout.bytes_per_page:
                raise ValueError(f"chunk: wanted {count} pages, found {payload_bytes} bytes")
            landing = [(run.destination, run.pages) for run in runs(pages, pages)]
            await peer.connection.receive_into(self._pool.views(landing))
        with self._lock:
            incoming.landed_pages += count
            self._advance(room, Event.CHUNK)

    async def _last(self, peer: _Peer, room: int, pages: int, payload_bytes: int) -> None:
        rows = await peer.connection.receive_bytes(payload_bytes)
        incoming = self._granted_to(peer, room)
        if incoming is None:
            return
        if payload_bytes != self._aux.layout.bytes_per_page:
            raise ValueError(f"last: wanted {self._aux.layout.bytes_per_page} bytes of rows, found {payload_bytes}")
        with self._lock:
            if incoming.state is ReceiverState.FENCING:
                return
            if not pages == incoming.landed_pages == len(incoming.pages):
                granted, landed = len(incoming.pages), incoming.landed_pages
                self._fail(room, incoming, f"pages: wanted {granted}, found {landed} landed of {pages} sent")
                return
            start = 0
            for view in self._aux.views([(incoming.aux_row, 1)]):
                view[:] = rows[start : start + view.nbytes]
                start += view.nbytes
            self._advance(room, Event.LAST)
        peer.outbox.put_nowait(handoff.Ack(room))

    def _granted_to(self, peer: _Peer, room: int) -> _Incoming | None:
        """The room, if this peer still may write to it."""
        with self._lock:
            incoming = self._rooms.get(room)
            if incoming is None or incoming.peer is not peer or incoming.state in TERMINAL:
                return None
            return incoming

    def _stopped(self, peer: _Peer, room: int, reason: str) -> None:
        with self._lock:
            incoming = self._rooms.get(room)
            if incoming is not None and incoming.peer is peer:
                incoming.reason = incoming.reason or reason
                self._advance(room, Event.STOPPED)

    def _lose(self, address: Address, reason: str) -> None:
        with self._lock:
            for room, incoming in self._rooms.items():
                if incoming.address == address and incoming.state not in TERMINAL:
                    incoming.reason = incoming.reason or reason
                    self._advance(room, Event.STOPPED)

    async def _sweep(self) -> None:
        """Fails rooms whose deadline passed; cuts a connection that does not answer a fence."""
        while True:
            await asyncio.sleep(self._deadlines.ping_s)
            now_s = self._clock()
            with self._lock:
                for room, incoming in list(self._rooms.items()):
                    if incoming.state in TERMINAL:
                        if incoming.released:
                            del self._rooms[room]
                    elif incoming.deadline_s is not None and now_s > incoming.deadline_s:
                        self._overdue(room, incoming, now_s)

    def _overdue(self, room: int, incoming: _Incoming, now_s: float) -> None:
        if incoming.state is ReceiverState.FENCING:
            assert incoming.peer is not None, "a fencing room has a peer"
            incoming.peer.connection.cut()
        else:
            waited = f"{now_s - incoming.began_s:.1f} s"
            self._fail(room, incoming, f"hand-off not over after {waited}, in {incoming.state.name}")
