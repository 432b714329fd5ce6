"""Hand-offs under faults: is a byte ever wrong, a page lost for good, a room stuck?

Real processes: two prefill workers and a decode worker, each with a pool, a list of free pages
and a loop that stands for SGLang's scheduler. Between them this process plays the router, and a
network that cuts, stalls and delays.

    decode   grants pages; the moment a room is over they go to the next room, or get a canary
    prefill  computes chunks into source pages; the moment a room is over it scribbles on them
    here     aborts, SIGKILL, SIGSTOP and SIGCONT, also in the middle of a copy; cut connections

After every completed hand-off each byte must be the one that this room's prompt has, and again
when decode is done with it. A canary that changed was overwritten by a writer that should have
been fenced. After every round all pages must be free again.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import multiprocessing
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks import report
from benchmarks.unfinished import Unfinished, continue_argument
from transfer import session
from transfer.auth import ClusterKey
from transfer.courier import Courier
from transfer.deadlines import Deadlines
from transfer.layout import PoolLayout
from transfer.plan import Pages
from transfer.pool import Bytes, Pool, SharedAddress, SharedArena
from transfer.receiver import Receiver
from transfer.sender import Sender
from transfer.session import TERMINAL, Act, Event, ReceiverState, ReceiverStep, SenderState
from transfer.transport import Transport
from transfer.transports import make

LAYOUT = PoolLayout("faults", "uint8", 16, (8192, 16384), (64,), 256)
AUX_LAYOUT = PoolLayout("", "", 1, (64,), (), 128)
DEADLINES = Deadlines(connect_s=2.5, ping_s=0.05, silence_s=0.8, queue_s=2.5, handoff_s=2.0, fence_s=0.8, memory_s=60.0)
"""Short ones: most faults end by one of them."""
KEY = ClusterKey(bytes(range(32)))
PREFILLS = 2
TRIES_A_ROUND = 30
MOST_PAGES = 40
LOOK_S = 0.001
LONGEST_FREEZE_S = 1.8
MARGIN_S = 6.0
"""Beyond every deadline, for a machine that is busy with something else."""
START_TIMEOUT_S = 60.0
NOISE_BYTES = 1 << 20

ROUND_FAULTS = (
    "none",
    "prefill killed",
    "prefill killed in a copy",
    "prefill stopped briefly",
    "prefill stopped for long",
    "prefill stopped in a copy",
    "decode killed",
    "decode stopped for long",
    "all connections cut",
    "one connection cut",
    "cut after some bytes",
    "network stalls briefly",
    "network stalls for long",
    "slow network",
)
ROOM_FAULTS = {"none": 52, "decode aborts": 16, "prefill aborts": 12, "both abort": 12, "never finished": 8}
"""And how often, in percent."""


def patience_s(deadlines: Deadlines) -> float:
    """A room that is not over after so long is stuck."""
    every_wait_s = deadlines.queue_s + deadlines.handoff_s + deadlines.fence_s + deadlines.silence_s
    return 2 * deadlines.connect_s + every_wait_s + LONGEST_FREEZE_S + MARGIN_S


class Pattern:
    """What a page holds, by room and position: a wrong page is never right by chance."""

    def __init__(self, seed: int) -> None:
        self._noise = np.random.default_rng(seed).integers(0, 256, NOISE_BYTES + max(LAYOUT.page_bytes), np.uint8)

    def page(self, room: int, index: int, buffer: int) -> npt.NDArray[np.uint8]:
        """Bytes of one page in one buffer."""
        start = (room * 7919 + index * 104_729 + buffer * 15_485_863) % NOISE_BYTES
        return self._noise[start : start + LAYOUT.page_bytes[buffer]]

    def write(self, pool: Pool, page: int, room: int, index: int) -> None:
        for number, buffer in enumerate(pool.buffers):
            buffer[page] = self.page(room, index, number)

    def wrong_bytes(self, pool: Pool, page: int, room: int, index: int) -> int:
        return sum(
            int(np.count_nonzero(buffer[page] != self.page(room, index, number)))
            for number, buffer in enumerate(pool.buffers)
        )

    def aux(self, room: int) -> bytes:
        return bytes(self.page(room, 1 << 20, 0)[: AUX_LAYOUT.page_bytes[0]])


@dataclass(frozen=True)
class Try:
    """One hand-off and what will happen to it."""

    room: int
    fault: str
    prefill: int
    chunks: tuple[int, ...]
    """Pages in each."""
    prefix_tokens: int
    gap_s: float
    """Between two chunks."""
    decode_aborts_s: float | None
    """After decode heard of it."""
    prefill_aborts_s: float | None
    finished: bool
    """Whether prefill ever sends the last chunk."""
    kept_s: float
    """How long decode uses the pages."""

    @property
    def pages(self) -> int:
        return sum(self.chunks)


# What the worker processes are told, and what they say.


class Open(NamedTuple):
    attempt: Try
    port: int
    epoch: int | None


class Offer(NamedTuple):
    attempt: Try


class GiveUp(NamedTuple):
    """As the router does where the other leg failed."""

    room: int


class Trap(NamedTuple):
    """The next copy sends this signal to its own process when it is half done; None disarms."""

    signal: int | None


class Census(NamedTuple):
    pass


class Ended(NamedTuple):
    room: int
    state: str
    reason: str
    wrong_bytes: int


class Hung(NamedTuple):
    room: int
    state: str


class Counted(NamedTuple):
    leaked_pages: int
    wrong_bytes: int


class Ready(NamedTuple):
    port: int


@dataclass(frozen=True)
class Setting:
    """What all processes of a stage share."""

    transports: tuple[str, ...]
    seed: int
    deadlines: Deadlines
    logs: Path
    fenced: bool = True

    def log(self, worker: str) -> Path:
        return self.logs / f"{'-'.join(self.transports)}-{worker}.log"


class TrappedPool(Pool):
    """Copies slowly, so that faults find copies under way, and springs a trap in the middle of one."""

    def __init__(self, layout: PoolLayout, buffers: list[Bytes]) -> None:
        super().__init__(layout, buffers)
        self.trap: int | None = None
        self.chooser = random.Random(0)

    def copy_to(self, other: Pool, source: Pages, destination: Pages) -> None:
        half = max(1, len(source) // 2)
        for start in range(0, len(source), half):
            if start:
                self._spring()
                time.sleep(self.chooser.choice((0, 0, 0.001, 0.004, 0.02)))
            super().copy_to(other, source[start : start + half], destination[start : start + half])

    def views(self, starts_and_counts: Sequence[tuple[int, int]]) -> list[memoryview]:
        self._spring()
        return super().views(starts_and_counts)

    def _spring(self) -> None:
        trap, self.trap = self.trap, None
        if trap is not None:
            os.kill(os.getpid(), trap)


@dataclass
class _Room:
    attempt: Try
    began_s: float
    pages: list[int] = field(default_factory=list)
    row: int = -1
    granted: bool = False
    aborted: bool = False
    chunk: int = 0
    next_s: float = 0.0
    done_s: float | None = None
    wrong_bytes: int = 0


class PrefillDesk:
    """Prefill's scheduler, as far as hand-offs see it."""

    def __init__(self, setting: Setting, worker: str, epoch: int, port: int, say: Callable[[Any], None]) -> None:
        self._pool = TrappedPool.zeros(LAYOUT)
        self._pattern = Pattern(setting.seed)
        self._free = deque(range(1, LAYOUT.pages))
        self._rooms: dict[int, _Room] = {}
        self._say = say
        self._patience_s = patience_s(setting.deadlines)
        self._sender = Sender(
            self._pool,
            KEY,
            worker=worker,
            epoch=epoch,
            transports=_transports(setting, self._pool, None),
            deadlines=setting.deadlines,
        )
        say(Ready(self._sender.listen("127.0.0.1", port)))

    def take(self, order: Any) -> None:
        match order:
            case Offer(attempt):
                self._sender.offer(attempt.room)
                self._rooms[attempt.room] = _Room(attempt, time.monotonic())
            case GiveUp(room):
                self._sender.fail(room, "the other leg failed")
            case Trap(number):
                self._pool.trap = number
            case Census():
                leaked = LAYOUT.pages - 1 - len(self._free)
                self._say(Counted(leaked, 0))

    def look(self) -> None:
        now_s = time.monotonic()
        for number, room in list(self._rooms.items()):
            self._look_at(number, room, now_s)

    def _look_at(self, number: int, room: _Room, now_s: float) -> None:
        attempt, state = room.attempt, self._sender.state(number)
        if state in TERMINAL:
            # Another request computes into them at once.
            for page in room.pages:
                self._pattern.write(self._pool, page, -7, page)
            self._free.extend(room.pages)
            self._say(Ended(number, state.name, self._sender.reason(number), 0))
            self._sender.forget(number)
            del self._rooms[number]
        elif now_s - room.began_s > self._patience_s:
            self._say(Hung(number, state.name))
            del self._rooms[number]
        elif attempt.prefill_aborts_s is not None and now_s - room.began_s > attempt.prefill_aborts_s:
            self._sender.fail(number, "prefill aborts")
        elif state in (SenderState.GRANTED, SenderState.STREAMING) and now_s >= room.next_s:
            self._compute(number, room, now_s)

    def _compute(self, number: int, room: _Room, now_s: float) -> None:
        attempt = room.attempt
        if not room.granted:
            if len(self._free) < attempt.pages:
                return
            room.pages = [self._free.popleft() for _ in range(attempt.pages)]
            room.granted = True
        last = room.chunk == len(attempt.chunks) - 1
        if last and not attempt.finished:
            return
        start = sum(attempt.chunks[: room.chunk])
        pages = room.pages[start : start + attempt.chunks[room.chunk]]
        for index, page in enumerate(pages, start):
            self._pattern.write(self._pool, page, number, index)
        self._sender.send(number, np.array(pages, np.int32), [self._pattern.aux(number)] if last else None)
        room.chunk += 1
        room.next_s = now_s + attempt.gap_s if not last else float("inf")


class DecodeDesk:
    """Decode's scheduler, as far as hand-offs see it: it uses pages again the moment that it may."""

    def __init__(self, setting: Setting, epoch: int, say: Callable[[Any], None]) -> None:
        self._pool, address = SharedArena().pool(LAYOUT)
        self._aux = Pool.zeros(AUX_LAYOUT)
        self._pattern = Pattern(setting.seed)
        self._free: deque[int] = deque()
        self._free_rows = deque(range(AUX_LAYOUT.pages))
        self._lives = [0] * LAYOUT.pages
        self._rooms: dict[int, _Room] = {}
        self._wrong_bytes = 0
        self._say = say
        for page in range(LAYOUT.pages):
            self._release(page)
        self._patience_s = patience_s(setting.deadlines)
        self._receiver = Receiver(
            self._pool,
            self._aux,
            KEY,
            worker="decode",
            epoch=epoch,
            transports=_transports(setting, self._pool, address),
            deadlines=setting.deadlines,
        )
        say(Ready(0))

    def take(self, order: Any) -> None:
        match order:
            case Open(attempt, port, epoch):
                self._receiver.open(attempt.room, "127.0.0.1", port, epoch)
                self._rooms[attempt.room] = _Room(attempt, time.monotonic())
            case GiveUp(room):
                self._receiver.fail(room, "the other leg failed")
            case Census():
                wrong_bytes = self._wrong_bytes + sum(self._canary(page) for page in self._free)
                self._wrong_bytes = 0
                for page in self._free:
                    self._mark(page)
                self._say(Counted(LAYOUT.pages - len(self._free), wrong_bytes))

    def look(self) -> None:
        now_s = time.monotonic()
        for number, room in list(self._rooms.items()):
            self._look_at(number, room, now_s)

    def _look_at(self, number: int, room: _Room, now_s: float) -> None:
        attempt, state = room.attempt, self._receiver.state(number)
        match state:
            case ReceiverState.FAILED:
                self._end(number, room, state)
            case ReceiverState.DONE if room.done_s is None:
                room.done_s = now_s
                room.wrong_bytes += self._wrong_in(number, room)
            case ReceiverState.DONE:
                if now_s - (room.done_s or now_s) > attempt.kept_s:
                    room.wrong_bytes += self._wrong_in(number, room)
                    self._end(number, room, state)
            case _ if now_s - room.began_s > self._patience_s:
                self._say(Hung(number, state.name))
                del self._rooms[number]
            case _ if (
                attempt.decode_aborts_s is not None
                and not room.aborted
                and now_s - room.began_s > attempt.decode_aborts_s
            ):
                room.aborted = True
                self._receiver.fail(number, "decode aborts")
            case ReceiverState.READY:
                self._grant(number, room)

    def _grant(self, number: int, room: _Room) -> None:
        attempt = room.attempt
        if room.granted or len(self._free) < attempt.pages:
            return
        room.granted = True
        room.pages = [self._free.popleft() for _ in range(attempt.pages)]
        room.row = self._free_rows.popleft()
        self._wrong_bytes += sum(self._canary(page) for page in room.pages)
        self._receiver.grant(number, np.array(room.pages, np.int32), room.row, attempt.prefix_tokens)

    def _end(self, number: int, room: _Room, state: ReceiverState) -> None:
        self._say(Ended(number, state.name, self._receiver.reason(number), room.wrong_bytes))
        self._receiver.forget(number)
        del self._rooms[number]
        for page in room.pages:
            self._release(page)
        if room.row >= 0:
            self._free_rows.append(room.row)

    def _wrong_in(self, number: int, room: _Room) -> int:
        wrong = sum(self._pattern.wrong_bytes(self._pool, page, number, i) for i, page in enumerate(room.pages))
        row = bytes(self._aux.buffers[0][room.row])
        return wrong + sum(mine != wanted for mine, wanted in zip(row, self._pattern.aux(number), strict=True))

    def _release(self, page: int) -> None:
        """Free: the next room takes it first, so that a late write finds somebody to harm."""
        self._mark(page)
        self._free.appendleft(page)

    def _mark(self, page: int) -> None:
        self._lives[page] += 1
        self._pattern.write(self._pool, page, -1 - self._lives[page], page)

    def _canary(self, page: int) -> int:
        return self._pattern.wrong_bytes(self._pool, page, -1 - self._lives[page], page)


def _transports(setting: Setting, pool: Pool, shared: SharedAddress | None) -> list[Transport]:
    stall_s = setting.deadlines.silence_s
    return make(setting.transports, pool, shared=shared, tcp_lanes=2, nixl_devices=("lo",), stall_s=stall_s)


def _prefill_process(pipe: Pipe, setting: Setting, worker: str, epoch: int, port: int) -> None:
    _keep_log(setting.log(worker))
    _loop(pipe, PrefillDesk(setting, worker, epoch, port, pipe.send))


def _decode_process(pipe: Pipe, setting: Setting, worker: str, epoch: int) -> None:
    _keep_log(setting.log(worker))
    if not setting.fenced:
        _remove_fence()
    _loop(pipe, DecodeDesk(setting, epoch, pipe.send))


def _loop(pipe: Pipe, desk: PrefillDesk | DecodeDesk) -> None:
    with suppress(EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        while True:
            while pipe.poll():
                desk.take(pipe.recv())
            desk.look()
            time.sleep(LOOK_S)


def _keep_log(path: Path) -> None:
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for descriptor in (1, 2):  # UCX complains on the first.
        os.dup2(file, descriptor)
    os.close(file)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(name)s %(levelname)s %(message)s")


def _remove_fence() -> None:
    """Decode's pages come free the moment that a room fails, as in an engine without a fence. For this process only."""
    for state in (ReceiverState.GRANTED, ReceiverState.STREAMING, ReceiverState.LANDING):
        session.RECEIVER[state, Event.FAILED] = ReceiverStep(ReceiverState.FAILED, Act.SAY_STOP)
        session.RECEIVER[state, Event.STOPPED] = ReceiverStep(ReceiverState.FAILED)
        session.RECEIVER[state, Event.LOST] = ReceiverStep(ReceiverState.FAILED)


class Network:
    """Between decode and one prefill worker: passes bytes on, or does not. Methods may be called from any thread."""

    def __init__(self, seed: int) -> None:
        self._target = 0
        self._courier = Courier("network")
        self._chooser = random.Random(seed)
        self._pairs: list[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = []
        self._serving = 0
        self._delay_s = 0.0
        self._stalled_until_s = 0.0
        self._cut_after_bytes: int | None = None
        self.port = self._courier.run(self._listen(), START_TIMEOUT_S)

    def lead_to(self, port: int) -> None:
        self._target = port

    def cut_all(self) -> None:
        self._courier.call(self._cut_all)

    def cut_one(self) -> None:
        self._courier.call(self._cut_any)

    def cut_after(self, count_bytes: int) -> None:
        """The connection that carries the last of these bytes is cut."""
        self._cut_after_bytes = count_bytes

    def stall(self, for_s: float) -> None:
        self._stalled_until_s = time.monotonic() + for_s

    def delay(self, up_to_s: float) -> None:
        """Each read is passed on later, by so much at most; some connections are hit harder than others."""
        self._delay_s = up_to_s

    def close(self) -> None:
        self._courier.run(self._end(), START_TIMEOUT_S)
        self._courier.close()

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _end(self) -> None:
        """Nobody connects any more, and every connection's tasks have ended."""
        self._server.close()
        while self._serving:
            self._cut_all()
            await asyncio.sleep(LOOK_S)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._serving += 1
        try:
            await self._join(reader, writer)
        finally:
            self._serving -= 1

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        pair = (writer, far_writer)
        self._pairs.append(pair)
        try:
            await asyncio.gather(self._pump(reader, far_writer, pair), self._pump(far_reader, writer, pair))
        finally:
            self._pairs.remove(pair)
            self._cut(pair)

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> None:
        share = self._chooser.choice((0, 0.3, 1))
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                if self._delay_s:
                    await asyncio.sleep(share * self._chooser.uniform(0, self._delay_s))
                while (wait_s := self._stalled_until_s - time.monotonic()) > 0:
                    await asyncio.sleep(wait_s)
                if self._cut_after_bytes is not None:
                    self._cut_after_bytes -= len(data)
                    if self._cut_after_bytes <= 0:
                        self._cut_after_bytes = None
                        self._cut(pair)
                        return
                writer.write(data)
                await writer.drain()
        with suppress(OSError):
            _end(writer)

    def _cut_all(self) -> None:
        for pair in list(self._pairs):
            self._cut(pair)

    def _cut_any(self) -> None:
        if self._pairs:
            self._cut(self._chooser.choice(self._pairs))

    def _cut(self, pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter]) -> None:
        for writer in pair:
            writer.transport.abort()


class Worker:
    """A process that stands for a worker, restarted with a new epoch, on the same port, when it dies."""

    def __init__(self, setting: Setting, name: str) -> None:
        self.name = name
        self._setting = setting
        self.epoch = 0
        self.waiting: set[int] = set()
        """Rooms that it was told of and has not ended."""
        self.doomed = False
        """Whether its death was arranged: any other is a crash."""
        self.port = 0
        self.begin()

    def begin(self) -> None:
        self.epoch += 1
        self.waiting.clear()
        self.doomed = False
        self._pipe, far = multiprocessing.Pipe()
        self._process = self._start(far)
        far.close()
        if not self._pipe.poll(START_TIMEOUT_S):
            raise SystemExit(f"{self.name}: wanted it to start within {START_TIMEOUT_S:g} s")
        self.port = self._pipe.recv().port

    def _start(self, pipe: Pipe) -> multiprocessing.process.BaseProcess:
        context = multiprocessing.get_context("spawn")
        process: multiprocessing.process.BaseProcess
        if self.name == "decode":
            decode = (pipe, self._setting, self.name, self.epoch)
            process = context.Process(target=_decode_process, args=decode, daemon=True)
        else:
            prefill = (pipe, self._setting, self.name, self.epoch, self.port)
            process = context.Process(target=_prefill_process, args=prefill, daemon=True)
        process.start()
        return process

    @property
    def pid(self) -> int:
        assert self._process.pid is not None, "it was started"
        return self._process.pid

    def tell(self, order: Any) -> None:
        with suppress(OSError):  # It is dead; whoever looks next restarts it.
            self._pipe.send(order)

    def heard(self) -> Iterator[Any]:
        with suppress(EOFError, OSError):
            while self._pipe.poll():
                yield self._pipe.recv()

    def signal(self, number: int) -> None:
        if self._process.is_alive():
            os.kill(self.pid, number)

    def alive(self) -> bool:
        return self._process.is_alive()

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self._process.join(START_TIMEOUT_S)
        self._pipe.close()


@dataclass
class Tally:
    """What a round, or all of them, came to."""

    tried: int = 0
    done: int = 0
    hangs: int = 0
    wrong_bytes: int = 0
    leaked_pages: int = 0
    crashes: int = 0
    kinds: dict[str, Counter[str]] = field(default_factory=dict)
    stuck: list[str] = field(default_factory=list)
    surprises: Counter[str] = field(default_factory=Counter)
    """Why hand-offs failed to which nothing was done: on a machine that is busy enough, a deadline."""

    def kind(self, name: str) -> Counter[str]:
        return self.kinds.setdefault(name, Counter())

    def add(self, other: dict[str, Any]) -> None:
        for name in ("tried", "done", "hangs", "wrong_bytes", "leaked_pages", "crashes"):
            setattr(self, name, getattr(self, name) + other[name])
        for name, counted in other["kinds"].items():
            self.kind(name).update(counted)
        self.stuck += other["stuck"]
        self.surprises.update(other["surprises"])

    def as_dict(self) -> dict[str, Any]:
        return {
            "tried": self.tried,
            "done": self.done,
            "hangs": self.hangs,
            "wrong_bytes": self.wrong_bytes,
            "leaked_pages": self.leaked_pages,
            "crashes": self.crashes,
            "kinds": {name: dict(counted) for name, counted in sorted(self.kinds.items())},
            "stuck": self.stuck[:20],
            "surprises": dict(self.surprises.most_common(10)),
        }


class Stage:
    """The processes of one transport, and the rounds played on them."""

    def __init__(self, setting: Setting) -> None:
        self._seed = setting.seed
        self._prefills = [Worker(setting, f"prefill-{number}") for number in range(PREFILLS)]
        self._decode = Worker(setting, "decode")
        self._networks = [Network(setting.seed + number) for number in range(PREFILLS)]
        for network, prefill in zip(self._networks, self._prefills, strict=True):
            network.lead_to(prefill.port)

    def close(self) -> None:
        for worker in (*self._prefills, self._decode):
            worker.end()
        for network in self._networks:
            network.close()

    def play(self, number: int, fault: str, tries: int) -> dict[str, Any]:
        """One round: these many hand-offs at once, and one fault of a process or of the network."""
        chooser = random.Random(f"{self._seed} {number} {fault}")
        attempts = {one.room: one for one in (_draw(chooser) for _ in range(tries))}
        round_ = _Round(self._decode, self._prefills, self._networks, attempts, fault, chooser)
        round_.run()
        return round_.tally.as_dict()


class _Round:
    def __init__(
        self,
        decode: Worker,
        prefills: list[Worker],
        networks: list[Network],
        attempts: dict[int, Try],
        fault: str,
        chooser: random.Random,
    ) -> None:
        self.tally = Tally()
        self._decode = decode
        self._prefills = prefills
        self._networks = networks
        self._attempts = attempts
        self._fault = fault
        self._chooser = chooser
        self._script: list[tuple[float, Callable[[], None]]] = []
        self._go_on_from_s = float("inf")
        """From then on nobody stays stopped."""
        self._began_s = time.monotonic()

    def run(self) -> None:
        for attempt in self._attempts.values():
            self._prepare(attempt)
        self._prepare_fault()
        deadline_s = self._began_s + patience_s(DEADLINES) + START_TIMEOUT_S
        while self._script or any(worker.waiting for worker in self._everyone()):
            self._turn()
            if time.monotonic() > deadline_s:
                for worker in self._everyone():
                    self.tally.hangs += len(worker.waiting)
                    self.tally.stuck += [
                        f"{self._fault}: {worker.name} says nothing of {room}" for room in worker.waiting
                    ]
                    worker.waiting.clear()
                break
        for network in self._networks:
            network.delay(0)
        self._count()

    def _everyone(self) -> list[Worker]:
        return [*self._prefills, self._decode]

    def _at(self, after_s: float, action: Callable[[], None]) -> None:
        self._script.append((self._began_s + after_s, action))

    def _prepare(self, attempt: Try) -> None:
        chooser, prefill = self._chooser, self._prefills[attempt.prefill]
        first_s = chooser.uniform(0, 0.2)
        epoch = prefill.epoch if chooser.random() < 0.5 else None

        def open_() -> None:
            self._decode.waiting.add(attempt.room)
            self._decode.tell(Open(attempt, self._networks[attempt.prefill].port, epoch))

        def offer() -> None:
            prefill.waiting.add(attempt.room)
            prefill.tell(Offer(attempt))

        self._at(first_s + chooser.uniform(0, 0.05), open_)
        self._at(first_s + chooser.uniform(0, 0.05), offer)
        self.tally.tried += 1
        self._kind(attempt)["tried"] += 1

    def _prepare_fault(self) -> None:
        chooser = self._chooser
        victim = chooser.randrange(PREFILLS)
        prefill, network = self._prefills[victim], self._networks[victim]
        at_s = chooser.uniform(0.03, 0.25)
        briefly_s, long_s = chooser.uniform(0.05, 0.4), chooser.uniform(1.1, LONGEST_FREEZE_S)
        match self._fault:
            case "prefill killed":
                self._at(at_s, lambda: self._kill(prefill))
            case "prefill killed in a copy":
                self._at(at_s, lambda: self._trap_to_kill(prefill))
            case "prefill stopped briefly":
                self._stop(prefill, at_s, briefly_s)
            case "prefill stopped for long":
                self._stop(prefill, at_s, long_s)
            case "prefill stopped in a copy":
                self._at(at_s, lambda: prefill.tell(Trap(signal.SIGSTOP)))
                self._go_on_from_s = self._began_s + at_s + long_s
                self._at(at_s + long_s, lambda: None)
            case "decode killed":
                self._at(at_s, lambda: self._kill(self._decode))
            case "decode stopped for long":
                self._stop(self._decode, at_s, long_s)
            case "all connections cut":
                self._at(at_s, network.cut_all)
            case "one connection cut":
                for later in range(3):
                    self._at(at_s + 0.1 * later, network.cut_one)
                network.delay(0.01)
            case "cut after some bytes":
                self._at(at_s / 2, lambda: network.cut_after(chooser.randrange(1 << 20)))
            case "network stalls briefly":
                self._at(at_s, lambda: network.stall(briefly_s))
            case "network stalls for long":
                self._at(at_s, lambda: network.stall(long_s))
            case "slow network":
                network.delay(0.03)
            case _:
                pass

    def _kill(self, worker: Worker) -> None:
        worker.doomed = True
        worker.signal(signal.SIGKILL)

    def _trap_to_kill(self, worker: Worker) -> None:
        worker.doomed = True
        worker.tell(Trap(signal.SIGKILL))

    def _stop(self, worker: Worker, at_s: float, for_s: float) -> None:
        self._at(at_s, lambda: worker.signal(signal.SIGSTOP))
        self._go_on_from_s = self._began_s + at_s + for_s
        self._at(at_s + for_s, lambda: None)

    def _turn(self) -> None:
        now_s = time.monotonic()
        due = [entry for entry in self._script if entry[0] <= now_s]
        self._script = [entry for entry in self._script if entry[0] > now_s]
        for _, action in sorted(due, key=lambda entry: entry[0]):
            action()
        for worker in self._everyone():
            if now_s >= self._go_on_from_s:
                worker.signal(signal.SIGCONT)
            for said in worker.heard():
                self._hear(worker, said)
            self._revive(worker)
        time.sleep(LOOK_S)

    def _revive(self, worker: Worker) -> None:
        if worker.alive():
            return
        for said in worker.heard():
            self._hear(worker, said)
        if not worker.doomed:
            self.tally.crashes += 1
            self.tally.stuck.append(f"{self._fault}: {worker.name} died by itself")
        worker.end()
        worker.begin()

    def _hear(self, worker: Worker, said: Any) -> None:
        match said:
            case Ended(room, state, reason, wrong_bytes):
                worker.waiting.discard(room)
                attempt = self._attempts[room]
                self._wrong(self._kind(attempt), wrong_bytes)
                if worker is self._decode:
                    self._kind(attempt)[state.lower()] += 1
                    self.tally.done += state == "DONE"
                    if state == "FAILED" and self._fault == attempt.fault == "none":
                        self.tally.surprises[re.sub(r"\d+(\.\d+)?", "N", reason)] += 1
                if state == "FAILED" and room % 2:
                    # The router ends the other leg; every other time it is too busy, and the deadlines have to do.
                    other = self._prefills[attempt.prefill] if worker is self._decode else self._decode
                    self._at(time.monotonic() - self._began_s + 0.05, lambda: other.tell(GiveUp(room)))
            case Hung(room, state):
                worker.waiting.discard(room)
                self.tally.hangs += 1
                self._kind(self._attempts[room])["hangs"] += 1
                self.tally.stuck.append(f"{self._fault}: {worker.name} {room} in {state}")
            case Counted(leaked_pages, wrong_bytes):
                self._counted.add(worker.name)
                self.tally.leaked_pages += leaked_pages
                counted = self.tally.kind(self._fault)
                counted["leaked_pages"] += leaked_pages
                self._wrong(counted, wrong_bytes)

    def _wrong(self, kind: Counter[str], wrong_bytes: int) -> None:
        self.tally.wrong_bytes += wrong_bytes
        if wrong_bytes:
            kind["wrong_bytes"] += wrong_bytes

    def _kind(self, attempt: Try) -> Counter[str]:
        """A room's own fault counts before that of its round."""
        return self.tally.kind(attempt.fault if attempt.fault != "none" else self._fault)

    def _count(self) -> None:
        """Every page of every pool, with time for a late write to do its harm."""
        time.sleep(0.05)
        self._counted: set[str] = set()
        asked: dict[str, int] = {}
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while len(self._counted) < len(self._everyone()):
            for worker in self._everyone():
                if asked.get(worker.name) != worker.epoch:
                    asked[worker.name] = worker.epoch
                    worker.tell(Trap(None))
                    worker.tell(Census())
            self._turn()
            if time.monotonic() > deadline_s:
                self.tally.hangs += 1
                self.tally.stuck.append(f"{self._fault}: a worker does not answer")
                return
        for worker in self._everyone():
            worker.doomed = False


def _draw(chooser: random.Random) -> Try:
    pages = chooser.choice((0, 1, 2, *range(3, MOST_PAGES), *range(3, MOST_PAGES)))
    cuts = sorted(chooser.randint(0, pages) for _ in range(chooser.choice((0, 0, 1, 2, 4))))
    bounds = [0, *cuts, pages]
    fault = chooser.choices(list(ROOM_FAULTS), list(ROOM_FAULTS.values()))[0]
    abort_s = chooser.choice((0.1, 0.3, 0.6))
    return Try(
        room=chooser.getrandbits(62),
        fault=fault,
        prefill=chooser.randrange(PREFILLS),
        chunks=tuple(end - start for start, end in pairwise(bounds)),
        prefix_tokens=16 * chooser.randrange(5),
        gap_s=chooser.choice((0, 0.005, 0.03, 0.08)),
        decode_aborts_s=chooser.uniform(0, abort_s) if fault in ("decode aborts", "both abort") else None,
        prefill_aborts_s=chooser.uniform(0, abort_s) if fault in ("prefill aborts", "both abort") else None,
        finished=fault != "never finished",
        kept_s=chooser.choice((0, 0.02, 0.1)),
    )


@contextmanager
def stage(
    transport: str, seed: int, *, deadlines: Deadlines = DEADLINES, fenced: bool = True
) -> Iterator[tuple[Stage, Path]]:
    """A stage and the folder of its processes' logs, both gone afterwards."""
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mainstem-faults-")))
        made = Stage(Setting((transport,), seed, deadlines, logs, fenced))
        stack.callback(made.close)
        yield made, logs


def untaken(logs: Path) -> list[str]:
    """The last lines of exceptions that nobody took, from the processes' logs."""
    found = []
    for log in sorted(logs.glob("*.log")):
        inside = False
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith("Traceback"):
                inside = True
            elif inside and line and not line[0].isspace():
                inside = False
                found.append(f"{log.stem}: {line}")
    return found


def available() -> tuple[str, ...]:
    nixl = any(importlib.util.find_spec(name) for name in ("nixl_cu13", "nixl_cu12", "nixl"))
    return ("shm", "tcp", "nixl") if nixl else ("shm", "tcp")


def main() -> None:
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--tries", type=int, default=2000, help="hand-offs in all (default 2000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--transports", default=",".join(available()), help="of shm, tcp, nixl; default: what is here")
    continue_argument(parser)
    options = parser.parse_args()
    names = options.transports.split(",")
    result = measure(names, options.tries, options.seed, Unfinished(options.unfinished))
    columns = ("fault", "tried", "done", "failed", "hangs", "wrong bytes", "leaked pages")
    keys = ("tried", "done", "failed", "hangs", "wrong_bytes", "leaked_pages")
    rows = [[name, *(counted.get(key, 0) for key in keys)] for name, counted in result["kinds"].items()]
    failed = sum(counted.get("failed", 0) for counted in result["kinds"].values())
    total = ["all", *({**result, "failed": failed}[key] for key in keys)]
    report.publish(result, columns, [*rows, total], options.json)
    clean = not any(result[name] for name in ("hangs", "wrong_bytes", "leaked_pages", "crashes", "untaken"))
    sys.exit(0 if clean else 1)


def measure(names: Sequence[str], tries: int, seed: int, unfinished: Unfinished) -> dict[str, Any]:
    """All rounds on all transports, as many hand-offs on each."""
    total, untaken_lines = Tally(), Counter[str]()
    began_s = time.monotonic()
    for transport in names:
        rounds = -(-tries // (len(names) * TRIES_A_ROUND))
        with stage(transport, seed) as (made, logs):
            for number in range(rounds):
                fault = ROUND_FAULTS[number % len(ROUND_FAULTS)]
                unit = {"faults": fault, "transport": transport, "round": number, "tries": TRIES_A_ROUND, "seed": seed}

                def play(number: int = number, fault: str = fault, made: Stage = made) -> dict[str, Any]:
                    return made.play(number, fault, TRIES_A_ROUND)

                played = unfinished.once(unit, play)
                total.add(played)
                bad = [
                    f"{key} {played[key]}" for key in ("hangs", "wrong_bytes", "leaked_pages", "crashes") if played[key]
                ]
                report.progress(
                    f"  {time.monotonic() - began_s:5.0f} s  {transport} round {number + 1} of {rounds}: "
                    f"{played['done']} of {played['tried']} done, {fault}  {'; '.join(bad + played['stuck'][:3])}"
                )
            untaken_lines.update(untaken(logs))
    for line, count in untaken_lines.items():
        report.progress(f"  nobody took, {count} times: {line}")
    return {**total.as_dict(), "untaken": sum(untaken_lines.values()), "transports": list(names), "seed": seed}


def _end(writer: asyncio.StreamWriter) -> None:
    """The other side has ended; a connection that was cut meanwhile needs no word of it."""
    if not writer.is_closing():
        writer.write_eof()


if __name__ == "__main__":
    threading.current_thread().name = "router"
    main()
