"""Frames on a TCP socket: one message of `transfer.handoff` each.

Everything here runs on one event loop; waiting for a socket never blocks it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

from transfer import handoff
from transfer.undecodable import UNDECODABLE


class PeerLost(Exception):
    """The connection ended, broke, or carried something that is no frame."""


class Connection:
    """One peer's socket. One task reads; several may send, each frame stays whole."""

    def __init__(self, sock: socket.socket, stall_s: float) -> None:
        """stall_s: a peer that sends nothing, or takes nothing, for so long is lost (see `expect_signs`)"""
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._stall_s = stall_s
        self._loop = asyncio.get_running_loop()
        self._sending = asyncio.Lock()
        self._limit_bytes = handoff.MAX_STRANGER_BYTES

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

    def expect_signs(self, stall_s: float) -> None:
        """The handshake is over, and the peer gives signs of life: without any for so long, it is lost."""
        self._stall_s = stall_s

    async def send(self, *messages: handoff.Message) -> None:
        """One frame for each, together. Raises PeerLost."""
        bodies = [handoff.encode(message) for message in messages]
        data = b"".join(part for body in bodies for part in (handoff.FRAME.pack(len(body)), body))
        async with self._sending:
            try:
                async with asyncio.timeout(self._stall_s):
                    await self._loop.sock_sendall(self._socket, data)
            except OSError as error:
                raise PeerLost(str(error) or self._silence) from error

    async def receive(self) -> handoff.Message:
        """The next message. Raises PeerLost."""
        (size_bytes,) = handoff.FRAME.unpack(await self._receive_bytes(handoff.FRAME.size))
        if size_bytes > self._limit_bytes:
            raise PeerLost(f"frame: wanted at most {self._limit_bytes} bytes, found {size_bytes}")
        body = await self._receive_bytes(size_bytes)
        try:
            message: handoff.Message = handoff.decode(body)
            return message
        except UNDECODABLE as error:
            raise PeerLost(f"frame: {error}") from error

    def detach(self) -> socket.socket:
        """The socket, for whoever goes on with it. Nothing that the peer sent after the last message is lost."""
        return self._socket

    def cut(self) -> None:
        """Ends the connection for both sides; whoever waits on it here finds PeerLost at once."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Gives the descriptor back. For the task that reads: another one's wait would not end."""
        self._socket.close()

    async def _receive_bytes(self, size_bytes: int) -> bytearray:
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

    @property
    def _silence(self) -> str:
        return f"silent for {self._stall_s:g} s"
