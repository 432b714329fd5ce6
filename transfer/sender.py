"""Prefill's side of every hand-off: it listens, is told where pages shall go, writes them there.

    scheduler's thread          the courier's thread
    offer(room)            ──>
                           <──  Grant arrives: state is GRANTED
    send(room, pages)      ──>  queued to the peer's writer: copied (shm) or streamed (tcp)
    send(room, …, aux)     ──>  … then Last
                           <──  Ack arrives: state is DONE

A peer's writer does one thing at a time, in order. So once it has answered Stop
with Stopped, no write for that room can follow: that is the fence.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from transfer import handoff
from transfer.auth import ClusterKey
from transfer.connection import Connection, PeerLost
from transfer.courier import Courier
from transfer.deadlines import Deadlines
from transfer.plan import Pages, check_range, runs
from transfer.pool import NotShared, Pool
from transfer.session import TERMINAL, Event, IllegalEvent, SenderState, next_sender

log = logging.getLogger(__name__)

ACCEPT_AGAIN_S = 0.1
MAX_STRANGERS = 64
"""Connections that have not proved yet that they hold the cluster's key; more are closed at once."""


@dataclass(frozen=True)
class _Write:
    """Pages of one chunk; the last one brings the auxiliary rows."""

    room: int
    source: Pages
    first: int
    aux: list[bytes] | None


@dataclass(frozen=True)
class _Say:
    message: handoff.Message


class _Outgoing:
    """One room, as prefill sees it. Guarded by the sender's lock."""

    def __init__(self, now_s: float, queue_s: float) -> None:
        self.state = SenderState.ABSENT
        self.peer: _Peer | None = None
        self.pages: Pages = np.empty(0, np.int32)
        self.prefix_tokens = 0
        self.queued_pages = 0
        self.sent_bytes = 0
        self.reason = ""
        self.deadline_s = now_s + queue_s
        self.began_s = now_s
        self.ended_s: float | None = None
        self.released = True
        """Whether nobody on this side asks for it (any more): only then may it be forgotten."""


class _Peer:
    """One decode worker that is connected."""

    def __init__(self, hello: handoff.Hello, connection: Connection, mapped: Pool | None) -> None:
        self.name = hello.worker
        self.epoch = hello.epoch
        self.layout = hello.layout
        self.connection = connection
        self.mapped = mapped
        """Its pool in this process's memory, where the transport is shm."""
        self.jobs: asyncio.Queue[_Write | _Say] = asyncio.Queue()


class Sender:
    """Listens for decode workers and writes pages to them. Methods may be called from any thread; none waits."""

    def __init__(
        self,
        pool: Pool,
        key: ClusterKey,
        *,
        worker: str,
        epoch: int,
        transports: tuple[str, ...],
        deadlines: Deadlines,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._key = key
        self._worker = worker
        self._epoch = epoch
        self._transports = transports
        self._deadlines = deadlines
        self._clock = clock
        self._lock = threading.Lock()
        self._rooms: dict[int, _Outgoing] = {}
        self._strangers = 0
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

    # What the scheduler's thread calls.

    def offer(self, room: int) -> bool:
        """This worker has the request of this room. False: another request has it, or had it just now.

        A room that decode gave up before it was offered is accepted, and has failed.
        """
        with self._lock:
            outgoing = self._rooms.get(room)
            if outgoing is not None and not outgoing.released:
                return False
            if outgoing is not None and outgoing.state is SenderState.DONE:
                return False
            self._advance(room, Event.OFFERED).released = False
            return True

    def send(self, room: int, pages: Pages, aux: list[bytes] | None = None) -> None:
        """Queues these pages of the pool, next in the prompt's order; `aux` makes it the last chunk.

        pages  indices into this worker's pool
        aux    the request's row of each auxiliary buffer, or None
        """
        with self._lock:
            outgoing = self._rooms.get(room)
            if outgoing is None or outgoing.state in TERMINAL:
                return
            if outgoing.queued_pages + len(pages) > len(outgoing.pages):
                wanted, found = len(outgoing.pages), outgoing.queued_pages + len(pages)
                self._fail(room, outgoing, f"pages: wanted at most the {wanted} granted ones, found {found}")
                return
            write = _Write(room, np.asarray(pages, np.int32), outgoing.queued_pages, aux)
            outgoing.queued_pages += len(pages)
            self._advance(room, Event.CHUNK if aux is None else Event.LAST)
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
        with self._lock:
            outgoing = self._rooms.get(room)
            return outgoing.state if outgoing is not None else SenderState.ABSENT

    def prefix_tokens(self, room: int) -> int:
        """Tokens at the prompt's start that decode holds already."""
        with self._lock:
            return self._rooms[room].prefix_tokens

    def reason(self, room: int) -> str:
        """Why the room failed; empty where it did not."""
        with self._lock:
            outgoing = self._rooms.get(room)
            return outgoing.reason if outgoing is not None else ""

    def sent_bytes(self, room: int) -> int:
        with self._lock:
            outgoing = self._rooms.get(room)
            return outgoing.sent_bytes if outgoing is not None else 0

    # State, always under the lock.

    def _advance(self, room: int, event: Event) -> _Outgoing:
        outgoing = self._rooms.get(room)
        if outgoing is None:
            outgoing = self._rooms[room] = _Outgoing(self._clock(), self._deadlines.queue_s)
        outgoing.state = next_sender(outgoing.state, event)
        if outgoing.state in TERMINAL and outgoing.ended_s is None:
            outgoing.ended_s = self._clock()
        return outgoing

    def _fail(self, room: int, outgoing: _Outgoing, reason: str) -> None:
        outgoing.reason = reason
        self._advance(room, Event.FAILED)
        if outgoing.peer is not None:
            self._courier.call(outgoing.peer.jobs.put_nowait, _Say(handoff.Stop(room, reason)))

    # The courier's thread.

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
                if self._strangers >= MAX_STRANGERS:
                    sock.close()
                    continue
                self._courier.spawn(self._serve(sock))
        finally:
            listener.close()

    async def _serve(self, sock: socket.socket) -> None:
        connection = Connection(sock, self._deadlines.silence_s)
        self._strangers += 1
        try:
            async with asyncio.timeout(self._deadlines.connect_s):
                peer = await self._handshake(connection)
        except (PeerLost, TimeoutError) as error:
            log.warning("hand-off connection refused: %s", error or "no handshake in time")
            connection.close()
            return
        finally:
            self._strangers -= 1
        log.info("decode worker connected worker=%s epoch=%d shm=%s", peer.name, peer.epoch, peer.mapped is not None)
        writer = self._courier.spawn(self._write(peer))
        reason = "this side failed"
        try:
            await self._read(peer)
        except PeerLost as error:
            reason = str(error)
        finally:
            log.info("decode worker lost worker=%s epoch=%d reason=%s", peer.name, peer.epoch, reason)
            self._lose(peer, f"lost decode worker {peer.name}: {reason}")
            writer.cancel()
            connection.close()

    async def _handshake(self, connection: Connection) -> _Peer:
        nonce = secrets.token_bytes(handoff.NONCE_BYTES)
        await connection.send(handoff.Challenge(handoff.VERSION, nonce))
        hello, _ = await connection.receive()
        if not isinstance(hello, handoff.Hello):
            raise PeerLost(f"handshake: wanted Hello, found {type(hello).__name__}")
        wanted = self._key.mac("handoff-decode", nonce, hello.nonce, hello.signed())
        if not hmac.compare_digest(wanted, hello.proof):
            await self._refuse(connection, "proof: wanted one made with this cluster's key")
        if hello.version != handoff.VERSION:
            await self._refuse(connection, f"version: wanted {handoff.VERSION}, found {hello.version}")
        if difference := self._pool.layout.mismatch(hello.layout):
            await self._refuse(connection, difference)
        transport, mapped, reason = self._choose(hello)
        if transport is None:
            await self._refuse(connection, f"transports: wanted one of {self._transports}, found {reason}")
        proof = self._key.mac("handoff-prefill", hello.nonce, nonce)
        await connection.send(handoff.Welcome(proof, self._worker, self._epoch, transport or "", reason))
        return _Peer(hello, connection, mapped)

    async def _refuse(self, connection: Connection, reason: str) -> None:
        await connection.send(handoff.Refused(reason))
        raise PeerLost(reason)

    def _choose(self, hello: handoff.Hello) -> tuple[str | None, Pool | None, str]:
        """The transport, the mapped pool where it is shm, and why no better one."""
        reasons = []
        for transport in hello.transports:
            if transport not in self._transports:
                reasons.append(f"{transport}: off here")
            elif transport == "tcp":
                return "tcp", None, "; ".join(reasons)
            elif transport == "shm" and hello.shared is not None:
                try:
                    return "shm", Pool.open_shared(hello.layout, hello.shared), "; ".join(reasons)
                except NotShared as error:
                    reasons.append(f"shm: {error}")
            else:
                reasons.append(f"{transport}: not offered with an address")
        return None, None, "; ".join(reasons) or "none"

    async def _read(self, peer: _Peer) -> None:
        while True:
            message, payload_bytes = await peer.connection.receive()
            if payload_bytes:
                raise PeerLost(f"payload: wanted none with {type(message).__name__}, found {payload_bytes} bytes")
            try:
                self._take(peer, message)
            except (IllegalEvent, ValueError) as error:
                raise PeerLost(str(error)) from error

    def _take(self, peer: _Peer, message: handoff.Message) -> None:
        match message:
            case handoff.Grant(room):
                self._granted(peer, room, message)
            case handoff.Ack(room):
                with self._lock:
                    self._own(peer, room)
                    self._advance(room, Event.ACKED)
            case handoff.Stop(room, reason):
                with self._lock:
                    outgoing = self._advance(room, Event.FAILED)
                    outgoing.reason = outgoing.reason or f"decode worker {peer.name}: {reason}"
                peer.jobs.put_nowait(_Say(handoff.Stopped(room)))
            case handoff.Ping() | handoff.Stopped():
                pass
            case _:
                raise PeerLost(f"message: wanted Grant, Ack, Stop or Ping, found {type(message).__name__}")

    def _granted(self, peer: _Peer, room: int, grant: handoff.Grant) -> None:
        pages = np.frombuffer(grant.pages, np.dtype("<i4"))
        check_range(pages, peer.layout.pages)
        with self._lock:
            outgoing = self._rooms.get(room)
            if outgoing is not None and outgoing.state in TERMINAL:
                reason = outgoing.reason or "the room has ended"
                peer.jobs.put_nowait(_Say(handoff.Stop(room, reason)))
                return
            outgoing = self._advance(room, Event.GRANTED)
            outgoing.peer, outgoing.pages, outgoing.prefix_tokens = peer, pages, grant.prefix_tokens
            outgoing.deadline_s = self._clock() + self._deadlines.handoff_s

    def _own(self, peer: _Peer, room: int) -> None:
        outgoing = self._rooms.get(room)
        if outgoing is None or outgoing.peer is not peer:
            raise ValueError(f"room: wanted one that worker {peer.name} granted, found {room}")

    async def _write(self, peer: _Peer) -> None:
        """Does the peer's jobs in order; an idle moment becomes a ping."""
        try:
            while True:
                try:
                    async with asyncio.timeout(self._deadlines.ping_s):
                        job = await peer.jobs.get()
                except TimeoutError:
                    job = _Say(handoff.Ping())
                if isinstance(job, _Say):
                    await peer.connection.send(job.message)
                else:
                    await self._write_chunk(peer, job)
        except PeerLost as error:
            log.info("write failed worker=%s reason=%s", peer.name, error)
        finally:
            # Whatever ended it: a connection on which nobody writes is none.
            peer.connection.cut()

    async def _write_chunk(self, peer: _Peer, write: _Write) -> None:
        with self._lock:
            outgoing = self._rooms.get(write.room)
            if outgoing is None or outgoing.state in TERMINAL:
                return
            destination = outgoing.pages[write.first : write.first + len(write.source)]
        if len(write.source):
            planned = runs(write.source, destination)
            chunk = handoff.Chunk(write.room, write.first, len(write.source))
            if peer.mapped is not None:
                self._pool.copy_to(peer.mapped, planned)
                await peer.connection.send(chunk)
            else:
                views = self._pool.views([(run.source, run.pages) for run in runs(write.source, write.source)])
                await peer.connection.send(chunk, views)
        with self._lock:
            outgoing.sent_bytes += len(write.source) * self._pool.layout.bytes_per_page
        if write.aux is not None:
            last = handoff.Last(write.room, write.first + len(write.source))
            await peer.connection.send(last, [memoryview(row) for row in write.aux])

    def _lose(self, peer: _Peer, reason: str) -> None:
        with self._lock:
            for room, outgoing in self._rooms.items():
                if outgoing.peer is peer and outgoing.state not in TERMINAL:
                    outgoing.reason = reason
                    self._advance(room, Event.STOPPED)

    async def _sweep(self) -> None:
        """Fails rooms whose deadline passed, and forgets those that ended long ago."""
        while True:
            await asyncio.sleep(self._deadlines.ping_s)
            now_s = self._clock()
            with self._lock:
                for room, outgoing in list(self._rooms.items()):
                    if outgoing.ended_s is not None:
                        if outgoing.released and now_s - outgoing.ended_s > self._deadlines.memory_s:
                            del self._rooms[room]
                    elif now_s > outgoing.deadline_s:
                        waited = f"{now_s - outgoing.began_s:.1f} s"
                        self._fail(room, outgoing, f"hand-off not over after {waited}, in {outgoing.state.name}")
