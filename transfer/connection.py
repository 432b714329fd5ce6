"""Frames on a TCP socket: messages of `transfer.handoff`, and pages straight from and into a pool.

Payloads go through `sendmsg` and `recvmsg_into` with one vector entry for each run
of pages, so the kernel's copy is the only one. Everything here runs on one event
loop; waiting for a socket never blocks it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence

from transfer import handoff

_IOV_MAX = 1024
"""Vector entries a system call takes (Linux: UIO_MAXIOV)."""


class PeerLost(Exception):
    """The connection ended, broke, or carried something that is no frame."""


class Connection:
    """One peer's socket. One task reads; several may send, each frame stays whole."""

    def __init__(self, sock: socket.socket, stall_s: float) -> None:
        """stall_s: a peer that sends nothing, or takes nothing, for so long is lost"""
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._stall_s = stall_s
        self._loop = asyncio.get_running_loop()
        self._sending = asyncio.Lock()

    @classmethod
    async def connect(cls, host: str, port: int, timeout_s: float, stall_s: float) -> Connection:
        """Raises PeerLost with the address and the reason, also for an address that is none."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.get_running_loop().sock_connect(sock, (host, port))
        except (OSError, ValueError, OverflowError) as error:
            sock.close()
            raise PeerLost(f"{host}:{port}: {str(error) or f'no answer within {timeout_s:g} s'}") from error
        return cls(sock, stall_s)

    async def send(self, message: handoff.Message, payload: Sequence[memoryview] = ()) -> None:
        """One frame. Raises PeerLost."""
        body = handoff.encode(message)
        header = handoff.FRAME.pack(len(body), sum(view.nbytes for view in payload))
        async with self._sending:
            await self._send_views([memoryview(header + body), *payload])

    async def receive(self) -> tuple[handoff.Message, int]:
        """The next message, and the bytes of payload that follow it: read them before the next call.

        Raises PeerLost.
        """
        header = await self.receive_bytes(handoff.FRAME.size)
        message_bytes, payload_bytes = handoff.FRAME.unpack(header)
        if message_bytes > handoff.MAX_MESSAGE_BYTES:
            raise PeerLost(f"frame: wanted at most {handoff.MAX_MESSAGE_BYTES} bytes, found {message_bytes}")
        body = await self.receive_bytes(message_bytes)
        try:
            return handoff.decode(body), payload_bytes
        except handoff.DecodeError as error:
            raise PeerLost(f"frame: {error}") from error

    async def receive_into(self, views: Sequence[memoryview]) -> None:
        """Fills these views, in order, with the payload. Raises PeerLost."""
        left = [view for view in views if view.nbytes]
        while left:
            try:
                received = self._socket.recvmsg_into(left[:_IOV_MAX])[0]
            except BlockingIOError:
                await self._ready(self._loop.add_reader, self._loop.remove_reader)
                continue
            except OSError as error:
                raise PeerLost(str(error)) from error
            if received == 0:
                raise PeerLost("connection closed in the middle of a frame")
            left = _after(left, received)

    def cut(self) -> None:
        """Ends the connection for both sides; whoever waits on it here finds PeerLost at once."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Gives the descriptor back. For the task that reads: another one's wait would not end."""
        self._socket.close()

    async def receive_bytes(self, size_bytes: int) -> bytearray:
        """So many bytes, for what has no place of its own, or no place any more. Raises PeerLost."""
        data = bytearray(size_bytes)
        view = memoryview(data)
        while view.nbytes:
            try:
                async with asyncio.timeout(self._stall_s):
                    received = await self._loop.sock_recv_into(self._socket, view)
            except OSError as error:
                raise PeerLost(str(error) or self._silence) from error
            if received == 0:
                raise PeerLost("connection closed")
            view = view[received:]
        return data

    async def _send_views(self, views: list[memoryview]) -> None:
        left = [view for view in views if view.nbytes]
        while left:
            try:
                sent = self._socket.sendmsg(left[:_IOV_MAX])
            except BlockingIOError:
                await self._ready(self._loop.add_writer, self._loop.remove_writer)
                continue
            except OSError as error:
                raise PeerLost(str(error)) from error
            left = _after(left, sent)

    async def _ready(self, add: Callable[..., None], remove: Callable[[int], bool]) -> None:
        ready: asyncio.Future[None] = self._loop.create_future()
        descriptor = self._socket.fileno()
        if descriptor < 0:
            raise PeerLost("connection closed")
        add(descriptor, _settle, ready)
        try:
            async with asyncio.timeout(self._stall_s):
                await ready
        except TimeoutError as error:
            raise PeerLost(self._silence) from error
        finally:
            remove(descriptor)

    @property
    def _silence(self) -> str:
        return f"silent for {self._stall_s:g} s"


def _settle(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def _after(views: list[memoryview], done_bytes: int) -> list[memoryview]:
    """What is left of `views` when their first `done_bytes` are dealt with."""
    for index, view in enumerate(views):
        if done_bytes < view.nbytes:
            return [view[done_bytes:], *views[index + 1 :]]
        done_bytes -= view.nbytes
    return []
