"""Frames on a TCP socket: one message of `transfer.handoff` each.

Everything here runs on one event loop; waiting for a socket never blocks it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from transfer import handoff
from transfer.undecodable import UNDECODABLE

_READ_BYTES = 1 << 16
"""Read at once, where so much has come."""
_READ_FIRST_S = 0.05


class PeerLost(Exception):
    """The connection ended, broke, or carried something that is no frame."""


class Connection:
    """One peer's socket. One task reads; several may send, each frame stays whole."""

    def __init__(self, sock: socket.socket, send_s: float) -> None:
        """send_s: a peer that takes nothing for so long is lost"""
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._send_s = send_s
        self._loop = asyncio.get_running_loop()
        self._sending = asyncio.Lock()
        self._limit_bytes = handoff.MAX_STRANGER_BYTES
        self._received = bytearray()
        """What has come and is not read yet."""
        self._heard_s = self._loop.time()
        self._why_cut = ""

    @classmethod
    async def connect(cls, host: str, port: int, timeout_s: float) -> Connection:
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
        except BaseException:
            sock.close()
            raise
        return cls(sock, timeout_s)

    def trust(self) -> None:
        """The peer has proved that it holds the cluster's key: from now on long messages are taken."""
        self._limit_bytes = handoff.MAX_MESSAGE_BYTES

    async def ping(self, every_s: float) -> None:
        """Gives signs of life until cancelled, or until the peer takes none."""
        try:
            while True:
                await asyncio.sleep(every_s)
                await self.send(handoff.Ping())
        except PeerLost:
            self.cut()

    async def watch(self, silence_s: float) -> None:
        """Cuts the connection once the peer has given no sign of life for so long."""

        def left_s() -> float:
            return self._heard_s + silence_s - self._loop.time()

        while left_s() > 0:
            await asyncio.sleep(left_s())
            if left_s() <= 0:
                # Where this side itself was held up, what has come meanwhile is read first.
                await asyncio.sleep(_READ_FIRST_S)
        self._why_cut = f"silent for {silence_s:g} s"
        self.cut()

    async def send(self, *messages: handoff.Message) -> None:
        """One frame for each, together. Raises PeerLost."""
        bodies = [handoff.encode(message) for message in messages]
        data = b"".join(part for body in bodies for part in (handoff.FRAME.pack(len(body)), body))
        try:
            async with self._sending:
                sent = self._send_now(data)
                if sent < len(data):
                    async with asyncio.timeout(self._send_s):
                        await self._loop.sock_sendall(self._socket, memoryview(data)[sent:])
        except OSError as error:
            raise PeerLost(self._why_cut or str(error) or f"took nothing for {self._send_s:g} s") from error

    async def receive(self) -> handoff.Message:
        """The next message. Raises PeerLost."""
        size_bytes = handoff.FRAME.unpack(await self._take(handoff.FRAME.size))[0]
        if size_bytes > self._limit_bytes:
            raise PeerLost(f"frame: wanted at most {self._limit_bytes} bytes, found {size_bytes}")
        body = await self._take(size_bytes)
        try:
            message: handoff.Message = handoff.decode(body)
            return message
        except UNDECODABLE as error:
            raise PeerLost(f"frame: {error}") from error

    def detach(self) -> socket.socket:
        """The socket, for whoever goes on with it. Raises PeerLost where the peer did not wait for that."""
        if self._received:
            raise PeerLost(f"lane: wanted nothing before it is used, found {len(self._received)} bytes")
        return self._socket

    def cut(self) -> None:
        """Ends the connection for both sides; whoever waits on it here finds PeerLost at once."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Gives the descriptor back. For the task that reads: another one's wait would not end."""
        self._socket.close()

    def _send_now(self, data: bytes) -> int:
        """How much of it the kernel took at once. Raises OSError."""
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0

    async def _take(self, size_bytes: int) -> bytes:
        """The next bytes. Raises PeerLost."""
        while len(self._received) < size_bytes:
            try:
                some = await self._loop.sock_recv(self._socket, max(_READ_BYTES, size_bytes - len(self._received)))
            except OSError as error:
                raise PeerLost(self._why_cut or str(error)) from error
            if not some:
                raise PeerLost(self._why_cut or "connection closed")
            self._heard_s = self._loop.time()
            self._received += some
        taken = bytes(self._received[:size_bytes])
        del self._received[:size_bytes]
        return taken
