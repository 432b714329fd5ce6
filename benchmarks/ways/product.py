"""The hand-off as it ships: `transfer.sender` in one process, `transfer.receiver` in the other, a real handshake.

Timed from the scheduler's call `send` to the moment at which decode's room is DONE, which the
receiver tells through `on_end`. Looking at the state instead measures the looking: without a
pause it takes the interpreter from the courier's thread, and a hand-off of 64 pages of 16 KiB
takes ten times as long on two cores; with a sleep of 50 us or 1 ms it ends up to a quarter later.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np

from benchmarks.ways.cell import AUX, Cell
from benchmarks.ways.ends import WAIT_S, HandOffFailed
from benchmarks.ways.memory import DecodeMemory, over
from transfer.auth import ClusterKey
from transfer.deadlines import Deadlines
from transfer.ended import Ended
from transfer.layout import PoolLayout
from transfer.memory import Memory
from transfer.plan import Pages
from transfer.pool import Pool, SharedAddress
from transfer.receiver import Receiver
from transfer.sender import Sender
from transfer.session import ReceiverState, SenderState
from transfer.transport import Transport
from transfer.transports import make

KEY = ClusterKey(bytes(range(32)))
HOST = "127.0.0.1"
DEVICES = ("lo",)
DEADLINES = Deadlines()
_LOOK_S = 50e-6


def make_sender(transport: str, pool: Pool, lanes: int, memory: Memory = "DRAM") -> Sender:
    transports = _transports(transport, pool, None, lanes, memory)
    return Sender(pool, KEY, worker="prefill-0", epoch=1, transports=transports, deadlines=DEADLINES)


def make_receiver(
    transport: str,
    pool: Pool,
    shared: SharedAddress | None,
    lanes: int,
    on_end: Callable[[Ended], None] | None = None,
    memory: Memory = "DRAM",
) -> Receiver:
    """It has one auxiliary row, number 0."""
    transports = _transports(transport, pool, shared, lanes, memory)
    aux = Pool.zeros(PoolLayout("", "", 1, pool.layout.aux_row_bytes, (), 1))
    return Receiver(
        pool, aux, KEY, worker="decode-0", epoch=1, transports=transports, deadlines=DEADLINES, on_end=on_end
    )


def _transports(
    transport: str, pool: Pool, shared: SharedAddress | None, lanes: int, memory: Memory
) -> list[Transport]:
    return make(
        (transport,),
        pool,
        shared=shared,
        tcp_lanes=lanes,
        nixl_devices=DEVICES,
        stall_s=DEADLINES.silence_s,
        memory=memory,
    )


class ProductPrefill:
    def __init__(self, transport: str, pool: Pool, lanes: int, memory: Memory = "DRAM") -> None:
        self._sender = make_sender(transport, pool, lanes, memory)
        self._port = self._sender.listen(HOST, 0)

    def describe(self) -> int:
        return self._port

    def send(self, room: int, source: Pages, destination: Pages) -> float:
        self._sender.offer(room)
        deadline_s = time.monotonic() + WAIT_S
        while self._sender.state(room) is not SenderState.GRANTED:
            if time.monotonic() > deadline_s or self._sender.state(room) is SenderState.FAILED:
                raise HandOffFailed(f"no grant: {self._sender.reason(room)}")
            time.sleep(_LOOK_S)
        self._sender.forget(room - 1)  # Its Ack came before this Grant.
        began_s = time.monotonic()
        self._sender.send(room, source, AUX)
        return began_s

    def close(self) -> None:
        self._sender.close()


class ProductDecode:
    def __init__(
        self, transport: str, pool: Pool, shared: SharedAddress | None, lanes: int, memory: Memory = "DRAM"
    ) -> None:
        self.pool = pool
        self._ended: Ended | None = None
        self._ended_s = 0.0
        self._over = threading.Event()
        self._port = 0
        self._receiver = make_receiver(transport, pool, shared, lanes, self._end, memory)

    def describe(self) -> None:
        return None

    def join(self, answer: int) -> None:
        self._port = answer

    def expect(self, room: int, destination: Pages) -> None:
        self._over.clear()
        self._receiver.open(room, HOST, self._port)
        deadline_s = time.monotonic() + WAIT_S
        while self._receiver.state(room) is ReceiverState.CONNECTING:
            if time.monotonic() > deadline_s:
                raise HandOffFailed("not connected in time")
            time.sleep(_LOOK_S)
        self._receiver.grant(room, destination, 0, 0)

    def wait(self, room: int) -> float:
        if not self._over.wait(WAIT_S):
            raise HandOffFailed(f"not over after {WAIT_S:g} s, in {self._receiver.state(room).name}")
        self._receiver.forget(room)
        if self._ended is None or self._ended.room != room or self._ended.reason:
            raise HandOffFailed(f"wanted room {room} to be done, found {self._ended}")
        return self._ended_s

    def close(self) -> None:
        self._receiver.close()

    def _end(self, ended: Ended) -> None:
        self._ended_s = time.monotonic()
        self._ended = ended
        self._over.set()


class StagedDecode:
    """The hand-off into a staging area in the mapping, and out of it into the pool: one copy more.

    It is what shared memory costs where the engine's tensors lie elsewhere.
    """

    def __init__(self, cell: Cell, memory: DecodeMemory) -> None:
        self.pool = over(memory.private, cell)
        self._inner = ProductDecode("shm", over(memory.shared, cell), memory.address, lanes=1)
        self._destination: Pages = np.empty(0, np.int32)

    def describe(self) -> None:
        return None

    def join(self, answer: int) -> None:
        self._inner.join(answer)

    def expect(self, room: int, destination: Pages) -> None:
        self._destination = destination
        self._inner.expect(room, np.arange(len(destination), dtype=np.int32))

    def wait(self, room: int) -> float:
        self._inner.wait(room)
        staged = np.arange(len(self._destination), dtype=np.int32)
        self._inner.pool.copy_to(self.pool, staged, self._destination)
        return time.monotonic()

    def close(self) -> None:
        self._inner.close()
