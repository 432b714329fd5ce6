"""TCP connections on their way through this process, where they can be cut, held up and slowed down.

client ──> Relay ──> target        one relay for each port that is to fail
client ──> Relay ──> one of many   the same is a plain TCP balancer
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, Self

Address = tuple[str, int]
_PIECE_BYTES = 64 * 1024
_STEP_S = 0.02
CONNECT_S = 2.0


class Relay:
    """Listens on a port of loopback, and passes on what comes to the first target that takes the connection.

    Used from any thread. All of it runs in the loop of its `Relays`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, targets: Sequence[Address]) -> None:
        self._loop = loop
        self._targets = targets
        self._turns = itertools.count()
        self._open = asyncio.Event()
        self._open.set()
        self._bytes_per_s = 0.0
        self._pairs: set[asyncio.StreamWriter] = set()

    def reset(self) -> None:
        """Every connection ends with a TCP reset, now."""
        self._loop.call_soon_threadsafe(self._reset)

    def hold(self) -> None:
        """Nothing passes any more, in any connection, old or new; nobody is told."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def slow(self, bytes_per_s: float) -> None:
        """Each connection passes so much, in each direction."""
        self._bytes_per_s = bytes_per_s

    def heal(self) -> None:
        """As at the beginning. What was held passes now."""
        self._bytes_per_s = 0.0
        self._loop.call_soon_threadsafe(self._open.set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, to its end."""
        there = await self._dial()
        if there is None:
            _abort(writer)
            return
        far_reader, far_writer = there
        self._pairs |= {writer, far_writer}
        end: Callable[[asyncio.StreamWriter], None] = _abort
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(reader, far_writer))
                both.create_task(self._pump(far_reader, writer))
            end = _close
        except* OSError:
            # One side is gone: so is the other.
            pass
        finally:
            for one in (writer, far_writer):
                self._pairs.discard(one)
                end(one)

    async def _dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        await self._open.wait()
        first = next(self._turns)
        for number in range(len(self._targets)):
            host, port = self._targets[(first + number) % len(self._targets)]
            try:
                async with asyncio.timeout(CONNECT_S):
                    reader, writer = await asyncio.open_connection(host, port)
            except (OSError, TimeoutError):
                continue
            _without_delay(writer)
            return reader, writer
        return None

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(_PIECE_BYTES):
            for part in self._parts(piece):
                await self._open.wait()
                writer.write(part)
                await writer.drain()
                if self._bytes_per_s:
                    await asyncio.sleep(len(part) / self._bytes_per_s)
        if writer.can_write_eof():
            await self._open.wait()
            writer.write_eof()

    def _parts(self, piece: bytes) -> list[bytes]:
        """Small ones where it is slow, so that it can be healed at any time."""
        if not self._bytes_per_s:
            return [piece]
        size = max(1, int(self._bytes_per_s * _STEP_S))
        return [piece[start : start + size] for start in range(0, len(piece), size)]

    def _reset(self) -> None:
        for writer in list(self._pairs):
            _abort(writer)


class Relays:
    """A thread with a loop for all relays of a program."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relays", daemon=True)
        self._servers: list[asyncio.Server] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def add(self, port: int, *targets: Address) -> Relay:
        """Listens on this port from now on. Raises OSError where it is taken."""
        relay = Relay(self._loop, targets)

        async def start() -> None:
            self._servers.append(await asyncio.start_server(_caught(relay), "127.0.0.1", port))

        self._run(start())
        return relay

    async def _close(self) -> None:
        for server in self._servers:
            server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        done: Future[None] = asyncio.run_coroutine_threadsafe(work, self._loop)
        done.result(10)


def free_base(count: int) -> int:
    """The first of so many ports in a row that are free now."""
    for base in range(21_000 + int(time.time()) % 4000, 60_000, count):
        if all(_is_free(port) for port in range(base, base + count)):
            return base
    raise OSError(f"wanted {count} free ports in a row, found none")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _caught(relay: Relay) -> Any:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _without_delay(writer)
        await relay.serve(reader, writer)

    return serve


def _without_delay(writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()


def _abort(writer: asyncio.StreamWriter) -> None:
    """Closes with a reset, unless it is closed already."""
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
