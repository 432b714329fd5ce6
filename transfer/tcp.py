"""Pages over plain sockets: several connections for each peer, no copy besides the kernel's.

Decode dials its lanes to prefill's hand-off port. A write is cut into as many stripes as there
are lanes; each is a frame (tag, first, count) and then the pages' bytes, buffer by buffer,
straight from the source pages and straight into the destination pages. Each lane has a thread,
so that the kernel's copying stands in nobody's way.

Decode's own threads write its pages, and only those that a tag expects: bytes for a tag that is
over are read and dropped. So the fence needs nobody's word.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from ipaddress import ip_address
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from transfer.layout import PoolLayout
from transfer.plan import Pages, check_lengths, check_range, runs
from transfer.pool import Pool
from transfer.transport import SLICE_BYTES, Ahead, Lanes, RouteLost, Unreachable, Wire

TOKEN_BYTES = 16
STRIPE_BYTES = 256 << 10
"""A stripe is not made smaller than this: a short write takes one lane."""
FRAME = struct.Struct("<qII")
_TIMEVAL = struct.Struct("@ll")
_IOV_MAX = 1024
"""Vector entries a system call takes (Linux: UIO_MAXIOV)."""
_SCRATCH_BYTES = 1 << 20
_LOOPBACK_BUFFER_BYTES = 256 << 10


class TcpTransport:
    """lanes    connections for each prefill worker, beside the hand-off connection
    stall_s  a peer that takes or sends nothing for so long, in the middle of pages, is lost
    """

    name = "tcp"

    def __init__(self, pool: Pool, *, lanes: int = 2, stall_s: float = 2.5) -> None:
        self._pool = pool
        self._lanes = lanes
        self._stall_s = stall_s

    async def land(self, wire: Wire) -> TcpLanding:
        token = secrets.token_bytes(TOKEN_BYTES)
        dialled: list[socket.socket] = []
        try:
            for _ in range(self._lanes):
                dialled.append(await wire.dial(token))
                _prepare(dialled[-1], self._stall_s)
        except BaseException as error:
            for sock in dialled:
                sock.close()
            if isinstance(error, OSError):
                raise RouteLost(f"tcp: {error}") from error
            raise
        return TcpLanding(self._pool, dialled, token, wire.broken)

    async def connect(self, description: bytes, layout: PoolLayout, lanes: Lanes) -> TcpRoute:
        taken = lanes.take(description)
        if not taken:
            raise Unreachable("tcp: wanted lanes that decode has dialled, found none")
        try:
            for sock in taken:
                _prepare(sock, self._stall_s)
        except OSError as error:
            for sock in taken:
                sock.close()
            raise Unreachable(f"tcp: {error}") from error
        return TcpRoute(self._pool, layout, taken)


@dataclass
class _Tag:
    """What one hand-off may write, and what of it is there. Guarded by the landing's lock."""

    pages: Pages
    missing: npt.NDArray[np.bool_]
    left: int
    reading: int = 0
    """Stripes that a lane is writing into these pages right now."""
    complete: Future[None] = field(default_factory=Future)
    quiet: Future[None] | None = None
    """Wanted by a fence: set once nothing is being read any more."""


class _Violation(Exception):
    """The peer wrote what it may not."""


class TcpLanding:
    """Decode's end: a thread for each lane."""

    def __init__(
        self,
        pool: Pool,
        dialled: Sequence[socket.socket],
        token: bytes,
        broken: Callable[[str], None],
    ) -> None:
        self._pool = pool
        self._sockets = list(dialled)
        self._token = token
        self._broken = broken
        self._lock = threading.Lock()
        self._tags: dict[int, _Tag] = {}
        self._reason = ""
        self._ended: list[Future[None]] = [Future() for _ in self._sockets]
        for number, (sock, ended) in enumerate(zip(self._sockets, self._ended, strict=True)):
            threading.Thread(target=self._follow, args=(sock, ended), name=f"tcp-lane-{number}", daemon=True).start()

    def describe(self) -> bytes:
        return self._token

    def expect(self, tag: int, pages: Pages) -> None:
        check_range(pages, self._pool.layout.pages)
        with self._lock:
            expected = _Tag(pages, np.ones(len(pages), np.bool_), len(pages))
            self._tags[tag] = expected
            if self._reason:
                expected.complete.set_exception(RouteLost(self._reason))
            elif not len(pages):
                expected.complete.set_result(None)

    def coming(self, tag: int) -> None:
        pass

    def in_place(self, tag: int) -> bool:
        with self._lock:
            expected = self._tags.get(tag)
            if expected is None or expected.left:
                return False
            del self._tags[tag]
            return True

    async def landed(self, tag: int) -> None:
        with self._lock:
            expected = self._tags.get(tag)
        if expected is None:
            raise RouteLost(self._reason or "tcp: the tag is over")
        await _done(expected.complete)
        with self._lock:
            self._tags.pop(tag, None)

    async def fence(self, tag: int) -> None:
        with self._lock:
            expected = self._tags.pop(tag, None)
            if expected is None:
                return
            if not expected.complete.done():
                expected.complete.set_exception(RouteLost("tcp: the tag is over"))
            if not expected.reading:
                return
            expected.quiet = Future()
        await _done(expected.quiet)

    async def disconnect(self) -> None:
        for sock in self._sockets:
            _shut(sock)
        for ended in self._ended:
            await _done(ended)
        self._end("tcp: disconnected")

    # The lanes' threads.

    def _follow(self, sock: socket.socket, ended: Future[None]) -> None:
        scratch = memoryview(bytearray(_SCRATCH_BYTES))
        try:
            while True:
                tag, first, count = FRAME.unpack(_receive_header(sock))
                self._take(sock, tag, first, count, scratch)
        except (OSError, EOFError, _Violation) as error:
            reason = f"tcp: {error or 'stalled'}"
        finally:
            sock.close()
            ended.set_result(None)
        self._end(reason)
        self._broken(reason)

    def _take(self, sock: socket.socket, tag: int, first: int, count: int, scratch: memoryview) -> None:
        with self._lock:
            expected = self._tags.get(tag)
            if expected is not None:
                if first + count > len(expected.pages) or not expected.missing[first : first + count].all():
                    raise _Violation(f"wanted pages that are missing, found {count} from {first}")
                expected.missing[first : first + count] = False
                expected.reading += 1
        if expected is None:
            left_bytes = count * self._pool.layout.bytes_per_page
            while left_bytes:
                part = scratch[:left_bytes]
                _receive([part], sock)
                left_bytes -= part.nbytes
            return
        try:
            pages = expected.pages[first : first + count]
            _receive(self._pool.views([(run.destination, run.pages) for run in runs(pages, pages)]), sock)
        finally:
            with self._lock:
                expected.reading -= 1
                if expected.quiet is not None and not expected.reading:
                    expected.quiet.set_result(None)
        with self._lock:
            expected.left -= count
            if not expected.left and not expected.complete.done():
                expected.complete.set_result(None)

    def _end(self, reason: str) -> None:
        """Whoever waits for pages of this peer waits in vain. The tags stay: another lane may still read for them."""
        with self._lock:
            self._reason = self._reason or reason
            for expected in self._tags.values():
                if not expected.complete.done():
                    expected.complete.set_exception(RouteLost(self._reason))


class TcpRoute:
    """Prefill's end."""

    landing_is_polled = False
    slice_bytes = SLICE_BYTES
    ahead: Ahead | None = None

    def __init__(self, pool: Pool, layout: PoolLayout, lanes: Sequence[socket.socket]) -> None:
        self._pool = pool
        self._layout = layout
        self._sockets = list(lanes)
        self._next = 0
        self._threads = ThreadPoolExecutor(len(self._sockets), thread_name_prefix="tcp-lane")
        self._connected = True

    async def write(self, tag: int, first: int, source: Pages, destination: Pages) -> None:
        check_range(source, self._pool.layout.pages)
        check_range(destination, self._layout.pages)
        check_lengths(source, destination)
        if not self._connected:
            raise RouteLost("tcp: disconnected")
        waiting = []
        for start, end in self._stripes(len(source)):
            sock = self._sockets[self._next]
            self._next = (self._next + 1) % len(self._sockets)
            stripe = source[start:end]
            header = memoryview(FRAME.pack(tag, first + start, end - start))
            left = _send_now(
                [header, *self._pool.views([(run.source, run.pages) for run in runs(stripe, stripe)])], sock
            )
            if left:
                waiting.append(asyncio.get_running_loop().run_in_executor(self._threads, _send, left, sock))
        for outcome in await asyncio.gather(*waiting, return_exceptions=True):
            if isinstance(outcome, OSError):
                raise RouteLost(f"tcp: {outcome}") from outcome
            if isinstance(outcome, BaseException):
                raise outcome

    async def settled(self) -> None:
        pass

    async def disconnect(self) -> None:
        if not self._connected:
            return
        self._connected = False
        for sock in self._sockets:
            _shut(sock)
        try:
            await asyncio.get_running_loop().run_in_executor(None, self._threads.shutdown)
        finally:
            for sock in self._sockets:
                sock.close()

    def _stripes(self, count: int) -> list[tuple[int, int]]:
        least = max(1, STRIPE_BYTES // self._layout.bytes_per_page)
        stripes = max(1, min(len(self._sockets), count // least))
        bounds = [count * number // stripes for number in range(stripes + 1)]
        return [(start, end) for start, end in pairwise(bounds) if end > start]


async def _done(future: Future[None]) -> None:
    """Waits for what a lane's thread says. Whoever is cancelled here does not cancel it for others."""
    await asyncio.shield(asyncio.wrap_future(future))


def _prepare(sock: socket.socket, stall_s: float) -> None:
    """Blocking, but not for ever."""
    sock.setblocking(True)
    if sock.family != socket.AF_UNIX and ip_address(sock.getpeername()[0]).is_loopback:
        # What lies between the two copies stays in the processor's cache: half the time for 64 MiB.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LOOPBACK_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _LOOPBACK_BUFFER_BYTES)
    limit = _TIMEVAL.pack(int(stall_s), int(stall_s % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _receive_header(sock: socket.socket) -> bytes:
    """Waits for as long as nothing comes: an idle lane is none that is lost. Raises OSError, EOFError."""
    header = bytearray(FRAME.size)
    while True:
        try:
            received = sock.recv_into(header, 1)
        except BlockingIOError:
            continue
        if received == 0:
            raise EOFError("lane closed")
        _receive([memoryview(header)[1:]], sock)
        return bytes(header)


def _receive(views: list[memoryview], sock: socket.socket) -> None:
    """Fills these views, in order. Raises OSError where nothing came for too long, EOFError."""
    left = views
    while left:
        received = sock.recvmsg_into(left[:_IOV_MAX], 0, socket.MSG_WAITALL)[0]
        if received == 0:
            raise EOFError("lane closed in the middle of pages")
        left = _after(left, received)


def _send_now(views: list[memoryview], sock: socket.socket) -> list[memoryview]:
    """Sends what the kernel takes at once; what is left. Raises RouteLost."""
    try:
        return _after(views, sock.sendmsg(views[:_IOV_MAX], (), socket.MSG_DONTWAIT))
    except BlockingIOError:
        return views
    except OSError as error:
        raise RouteLost(f"tcp: {error}") from error


def _send(views: list[memoryview], sock: socket.socket) -> None:
    """Sends all of it. Raises OSError."""
    left = views
    while left:
        left = _after(left, sock.sendmsg(left[:_IOV_MAX]))


def _after(views: list[memoryview], done_bytes: int) -> list[memoryview]:
    """What is left of `views` when their first `done_bytes` are dealt with."""
    for index, view in enumerate(views):
        if done_bytes < view.nbytes:
            return [view[done_bytes:], *views[index + 1 :]]
        done_bytes -= view.nbytes
    return []


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # It is closed, or the peer has closed it.
