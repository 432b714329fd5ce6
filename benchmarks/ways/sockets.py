"""Plain sockets as a first version would use them, and as SGLang's fallback does: the floor to beat.

A new TCP connection and a thread on either side for each request, one message in front, then
one `sendall` and one `recv_into` for each page.
"""

from __future__ import annotations

import queue
import socket
import struct
import threading
import time

from benchmarks.ways.cell import Cell
from benchmarks.ways.ends import WAIT_S, HandOffFailed
from benchmarks.ways.memory import Bytes, over
from transfer.plan import Pages

_STATUS = struct.Struct("<qI")


class SocketsPrefill:
    def __init__(self, cell: Cell, memory: Bytes, address: tuple[str, int]) -> None:
        self._pool = over(memory, cell)
        self._address = address

    def describe(self) -> None:
        return None

    def send(self, room: int, source: Pages, destination: Pages) -> float:
        began_s = time.monotonic()
        threading.Thread(target=self._send, args=(room, source), name=f"sockets-{room}", daemon=True).start()
        return began_s

    def close(self) -> None:
        pass

    def _send(self, room: int, source: Pages) -> None:
        (buffer,) = self._pool.buffers
        with socket.create_connection(self._address, WAIT_S) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(_STATUS.pack(room, len(source)))
            for page in source.tolist():
                sock.sendall(buffer[page].data)


class SocketsDecode:
    def __init__(self, cell: Cell, memory: Bytes) -> None:
        self.pool = over(memory, cell)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._expected: dict[int, Pages] = {}
        self._done: queue.SimpleQueue[tuple[int, float]] = queue.SimpleQueue()
        threading.Thread(target=self._accept, name="sockets-accept", daemon=True).start()

    def describe(self) -> tuple[str, int]:
        address: tuple[str, int] = self._listener.getsockname()
        return address

    def join(self, answer: None) -> None:
        pass

    def expect(self, room: int, destination: Pages) -> None:
        self._expected[room] = destination

    def wait(self, room: int) -> float:
        try:
            found, done_s = self._done.get(timeout=WAIT_S)
        except queue.Empty:
            raise HandOffFailed(f"sockets: not over after {WAIT_S:g} s") from None
        if found != room:
            raise HandOffFailed(f"sockets: wanted room {room}, found {found}")
        return done_s

    def close(self) -> None:
        # A plain close would leave the thread in accept().
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _address = self._listener.accept()
            except OSError:
                return  # Closed.
            threading.Thread(target=self._receive, args=(sock,), name="sockets-receive", daemon=True).start()

    def _receive(self, sock: socket.socket) -> None:
        (buffer,) = self.pool.buffers
        with sock:
            sock.settimeout(WAIT_S)
            status = bytearray(_STATUS.size)
            _fill(sock, memoryview(status))
            room, count = _STATUS.unpack(status)
            destination = self._expected.pop(room)
            if count != len(destination):
                raise HandOffFailed(f"sockets: wanted {len(destination)} pages, found {count}")
            for page in destination.tolist():
                _fill(sock, buffer[page].data)
        self._done.put((room, time.monotonic()))


def _fill(sock: socket.socket, view: memoryview) -> None:
    while view.nbytes:
        received = sock.recv_into(view)
        if not received:
            raise HandOffFailed("sockets: connection closed")
        view = view[received:]
