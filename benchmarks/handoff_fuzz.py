"""Hostile bytes on the hand-off port, from both sides: does a worker crash, hang, leak, or write where it should not?

A real prefill process and a real decode process hand pages over all the time. Meanwhile this
process attacks both: with noise, with well-formed messages that make no sense, with mutated
and replayed pieces of a recorded hand-off, with wrong proofs; and, holding the cluster's key,
with sessions and lanes that say what they must not.

    against prefill   as a decode worker, on its hand-off port
    against decode    as the prefill worker at the address that a request names

Afterwards: both live, every legitimate hand-off ended in time with its own bytes, every free
page of decode still has its canary, and neither memory nor descriptors grew without end.
"""

from __future__ import annotations

import os
import random
import secrets
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import psutil

from benchmarks import report
from benchmarks.handoff_faults import (
    KEY,
    LAYOUT,
    MARGIN_S,
    Census,
    Counted,
    Ended,
    GiveUp,
    Hung,
    Offer,
    Open,
    Setting,
    Try,
    Worker,
    untaken,
)
from transfer import handoff
from transfer.auth import ClusterKey
from transfer.deadlines import Deadlines
from transfer.lease import LeaseAddress
from transfer.pool import SharedAddress
from transfer.undecodable import UNDECODABLE

DEADLINES = Deadlines(connect_s=2, ping_s=0.1, silence_s=2.5, queue_s=5, handoff_s=10, fence_s=2, memory_s=3)
ANSWER_TIMEOUT_S = 3.0
"""An attacker waits no longer for a peer to cut it."""
ATTACKERS = 3
"""Threads against prefill."""
LEGITIMATE = 6
"""Hand-offs in flight."""
HOSTILE_ROOMS = 6
"""Rooms of decode that lead to the hostile prefill worker, at once."""
WARM_FRAMES = 0.2
"""Of all frames: memory and descriptors are compared with what they were then."""
EDGES = (0, 1, -1, 63, 255, 256, 1 << 15, 1 << 31, (1 << 31) - 1, -(1 << 31), (1 << 63) - 1, -(1 << 63), (1 << 64) - 1)
PATHS = ("/etc/passwd", "/dev/zero", "/dev/full", "", "/proc/self/mem", "/proc/1/fd/0", "\0", "../../x", "/proc/٣/fd/٤")

Message = handoff.Message
_FRAME = struct.Struct("<qII")
"""A stripe's header on a tcp lane."""


class Gone(Exception):
    """The other side ended the connection: what most attacks end with."""


class Hostile:
    """One connection of the attacker's."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        sock.settimeout(ANSWER_TIMEOUT_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @classmethod
    def dial(cls, port: int) -> Hostile:
        try:
            return cls(socket.create_connection(("127.0.0.1", port), ANSWER_TIMEOUT_S))
        except OSError as error:
            raise Gone(str(error)) from error

    def __enter__(self) -> Hostile:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def write(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise Gone(str(error)) from error

    def say(self, *messages: Message) -> None:
        self.write(b"".join(map(framed, messages)))

    def hear(self) -> Message:
        (size_bytes,) = handoff.FRAME.unpack(self._read(handoff.FRAME.size))
        message: Message = handoff.decode(self._read(size_bytes))
        return message

    def finish(self) -> None:
        """Says no more, and waits until the other side is done with what was said."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            while self._socket.recv(1 << 16):
                pass

    def linger(self) -> None:
        """Says nothing, for as long as the other side keeps the connection."""
        self._socket.settimeout(None)
        with suppress(OSError):
            while self._socket.recv(1 << 16):
                pass

    def _read(self, size_bytes: int) -> bytes:
        data = b""
        while len(data) < size_bytes:
            try:
                part = self._socket.recv(size_bytes - len(data))
            except OSError as error:
                raise Gone(str(error)) from error
            if not part:
                raise Gone("closed")
            data += part
        return data


def framed(message: Message) -> bytes:
    body = handoff.encode(message)
    return handoff.FRAME.pack(len(body)) + body


def frames_of(stream: bytes) -> list[bytes]:
    """The whole frames at the start of a recorded stream; a lane's pages make the rest unreadable, and are left out."""
    found, at = [], 0
    while at + handoff.FRAME.size <= len(stream):
        (size_bytes,) = handoff.FRAME.unpack_from(stream, at)
        end = at + handoff.FRAME.size + size_bytes
        if end > len(stream):
            break
        found.append(stream[at:end])
        at = end
    return found


class Inventor:
    """Messages that are well-formed and mean nothing, and bytes that are neither."""

    def __init__(self, chooser: random.Random, rooms: Sequence[int] = ()) -> None:
        self._chooser = chooser
        self.rooms = rooms
        """Rooms that somebody else uses."""

    def integer(self) -> int:
        return self._chooser.choice((self._chooser.choice(EDGES), self._chooser.randrange(1 << 62)))

    def room(self) -> int:
        if self.rooms and self._chooser.random() < 0.5:
            return self._chooser.choice(self.rooms)
        return self.integer()

    def noise(self, most_bytes: int = 400) -> bytes:
        return self._chooser.randbytes(self._chooser.randrange(most_bytes))

    def text(self) -> str:
        return self._chooser.choice(("", "shm", "tcp", "nixl", "x" * 3000, "\0", "{}%s", "é中", *PATHS))

    def pages(self) -> bytes:
        """Right ones, repeated ones, ones outside every pool, and no whole number of them."""
        count = self._chooser.randrange(40)
        kind = self._chooser.randrange(4)
        numbers = [self._chooser.randrange(LAYOUT.pages) for _ in range(count)]
        if kind == 1:
            numbers = [7] * count
        elif kind == 2:
            numbers.append(self._chooser.choice((-1, LAYOUT.pages, (1 << 31) - 1, -(1 << 31))))
        elif kind == 3:
            return self.noise()
        return struct.pack(f"<{len(numbers)}i", *numbers)

    def message(self) -> Message:
        chooser = self._chooser
        nonce = chooser.choice((chooser.randbytes(handoff.NONCE_BYTES), b"", self.noise()))
        names = tuple(self.text() for _ in range(chooser.randrange(4)))
        layout = msgspec.structs.replace(LAYOUT, pages=self.integer() if chooser.random() < 0.5 else LAYOUT.pages)
        made: Sequence[Callable[[], Message]] = (
            lambda: handoff.Challenge(chooser.choice((handoff.VERSION, self.integer())), nonce),
            lambda: handoff.Hello(handoff.VERSION, nonce, self.noise(), self.text(), self.integer(), layout, names),
            lambda: handoff.Welcome(self.noise(), self.text(), self.integer(), names),
            lambda: handoff.Refused(self.text()),
            lambda: handoff.Offer(self.text(), self.address()),
            lambda: handoff.Reached(),
            lambda: handoff.NotReached(self.text()),
            lambda: handoff.Lane(nonce, self.noise(), self.noise()),
            lambda: handoff.LaneOpen(self.noise()),
            lambda: handoff.Grant(self.room(), self.pages(), self.integer()),
            lambda: handoff.Chunk(self.room(), self.integer()),
            lambda: handoff.Last(self.room(), self.integer(), [self.noise() for _ in range(chooser.randrange(4))]),
            lambda: handoff.Ack(self.room()),
            lambda: handoff.Stop(self.room(), self.text()),
            lambda: handoff.Stopped(self.room()),
            lambda: handoff.Ping(),
        )
        return chooser.choice(made)()

    def address(self) -> bytes:
        """A transport's address that leads nowhere good."""
        chooser = self._chooser
        own = f"/proc/{os.getpid()}/fd/{chooser.randrange(12)}"
        path = chooser.choice((*PATHS, own, own, f"/proc/{os.getpid()}/fd/{self.integer()}"))
        offsets = tuple(self.integer() for _ in range(chooser.randrange(4)))
        shared = SharedAddress(path, chooser.randbytes(32), chooser.choice((0, 1, 4096, self.integer())), offsets)
        lease = LeaseAddress(chooser.choice((*PATHS, own)), b"\0" * 32)
        whole = msgspec.msgpack.encode((shared, lease))
        return chooser.choice((whole, whole, self.mutated(whole), self.noise(), b"", self.text().encode()))

    def mutated(self, data: bytes) -> bytes:
        chooser, changed = self._chooser, bytearray(data)
        for _ in range(chooser.choice((1, 1, 2, 8))):
            at = chooser.randrange(len(changed) + 1)
            match chooser.randrange(5):
                case 0 if at < len(changed):
                    changed[at] ^= 1 << chooser.randrange(8)
                case 1:
                    changed[at:at] = self.noise(20)
                case 2:
                    del changed[at : at + chooser.randrange(1, 9)]
                case 3:
                    changed[at : at + 4] = struct.pack("<I", self.integer() % (1 << 32))
                case _:
                    changed[at:at] = bytes([chooser.choice((0x91, 0xDC, 0xDD, 0xC1, 0xFF))]) * chooser.randrange(4000)
        return bytes(changed)


class AgainstPrefill:
    """What one attacker does to prefill's hand-off port. Each attack returns the frames that it sent."""

    def __init__(self, port: int, seed: int, recorded: Sequence[bytes]) -> None:
        self._port = port
        self._chooser = random.Random(f"decode {seed}")
        self._inventor = Inventor(self._chooser)
        self._recorded = recorded
        self._frames = [frame for stream in recorded for frame in frames_of(stream)]
        self.attacks: dict[str, tuple[int, Callable[[], int]]] = {
            "noise": (2, self.noise),
            "strange messages": (4, self.strange_messages),
            "replayed streams": (2, self.replayed),
            "replayed frames": (2, self.replayed_frames),
            "wrong proofs": (2, self.wrong_proofs),
            "too long a frame": (1, self.too_long),
            "bad offers": (2, self.bad_offers),
            "odd sessions": (6, self.odd_session),
            "odd lanes": (2, self.odd_lane),
            "shrinking memory": (1, self.shrinking_memory),
        }
        """And how often."""

    def attack(self) -> tuple[str, int]:
        names = list(self.attacks)
        name = self._chooser.choices(names, [self.attacks[one][0] for one in names])[0]
        return name, self.attacks[name][1]()

    def noise(self) -> int:
        with self._dial() as there:
            there.write(self._inventor.noise(5000))
            self._end(there)
        return 1

    def strange_messages(self) -> int:
        count = self._chooser.randrange(1, 5)
        data = b"".join(framed(self._inventor.message()) for _ in range(count))
        with self._dial() as there:
            there.write(self._inventor.mutated(data) if self._chooser.random() < 0.5 else data)
            self._end(there)
        return count

    def replayed(self) -> int:
        stream = self._chooser.choice(self._recorded)
        with self._dial() as there:
            there.write(self._inventor.mutated(stream) if self._chooser.random() < 0.5 else stream)
            self._end(there)
        return max(1, len(frames_of(stream)))

    def replayed_frames(self) -> int:
        """Single frames of a recorded hand-off, in any order, in an authenticated session or before it."""
        chosen = [self._chooser.choice(self._frames) for _ in range(self._chooser.randrange(1, 6))]
        data = b"".join(self._inventor.mutated(one) if self._chooser.random() < 0.3 else one for one in chosen)
        stage = self._chooser.randrange(3)
        with self._dial() as there:
            if stage:
                self._hello(there)
            if stage == 2:
                self._reach(there)
            there.write(data)
            self._end(there)
        return len(chosen)

    def wrong_proofs(self) -> int:
        other = ClusterKey(self._chooser.randbytes(32))
        with self._dial() as there:
            if self._chooser.random() < 0.5:
                self._hello(there, key=other)
            else:
                self._lane(there, b"t" * 16, key=other)
            self._end(there)
        return 1

    def too_long(self) -> int:
        with self._dial() as there:
            if self._chooser.random() < 0.5:
                self._hello(there)
                self._reach(there)
            size_bytes = self._chooser.choice((handoff.MAX_STRANGER_BYTES, handoff.MAX_MESSAGE_BYTES, 0xFFFFFFFF))
            there.write(handoff.FRAME.pack(size_bytes) + self._inventor.noise())
            self._end(there)
        return 1

    def bad_offers(self) -> int:
        """Addresses that lead to files, devices, pipes, nothing; lanes that nobody dialled."""
        count = self._chooser.randrange(1, 9)
        with self._dial() as there:
            pages = self._inventor.integer() if self._chooser.random() < 0.3 else LAYOUT.pages
            self._hello(there, pages=pages)
            there.hear()
            for _ in range(count):
                there.say(handoff.Offer(self._chooser.choice(("shm", "tcp")), self._inventor.address()))
                if not isinstance(there.hear(), handoff.NotReached):
                    break
            self._end(there)
        return count

    def odd_session(self) -> int:
        """With the key: many messages that are allowed and make no sense, and one that is not."""
        chooser, inventor = self._chooser, self._inventor
        allowed: Sequence[Callable[[], Message]] = (
            handoff.Ping,
            lambda: handoff.Stopped(inventor.room()),
            lambda: handoff.Stop(chooser.getrandbits(62), inventor.text()),
            lambda: handoff.Grant(chooser.getrandbits(62), struct.pack("<3i", 7, 7, 8), inventor.integer()),
        )
        count = chooser.randrange(1, 60)
        with self._dial() as there:
            self._hello(there)
            self._reach(there)
            there.say(*(chooser.choice(allowed)() for _ in range(count)))
            there.write(framed(inventor.message()) if chooser.random() < 0.8 else inventor.noise())
            self._end(there)
        return count + 1

    def odd_lane(self) -> int:
        """With the key: lanes under odd tokens, many under one, and noise on them."""
        token = self._chooser.choice((b"", b"t" * 16, b"x" * 20_000, self._inventor.noise()))
        with ExitStack() as stack:
            lanes = [stack.enter_context(self._dial()) for _ in range(self._chooser.randrange(1, 4))]
            for lane in lanes:
                self._lane(lane, token)
                with suppress(Gone):
                    lane.hear()
            if self._chooser.random() < 0.5:
                there = stack.enter_context(self._dial())
                self._hello(there, transports=("tcp",))
                there.hear()
                there.say(handoff.Offer("tcp", token))
                there.hear()
            for lane in lanes:
                lane.write(self._inventor.noise(3000))
            return len(lanes)

    def shrinking_memory(self) -> int:
        """With the key: memory that is taken away again once prefill has mapped it, and a lease that is none."""
        memory, lease = os.memfd_create("hostile"), os.memfd_create("hostile-lease")
        try:
            size_bytes = 4096 + LAYOUT.pages * LAYOUT.bytes_per_page
            token = secrets.token_bytes(32)
            os.ftruncate(memory, size_bytes)
            os.pwrite(memory, token, 0)
            os.pwrite(lease, b"\x01" + token, 0)
            here = f"/proc/{os.getpid()}/fd"
            offsets = (4096, 4096 + LAYOUT.pages * LAYOUT.page_bytes[0])
            address = SharedAddress(f"{here}/{memory}", token, size_bytes, offsets)
            with self._dial() as there:
                self._hello(there, transports=("shm",))
                there.hear()
                there.say(
                    handoff.Offer("shm", msgspec.msgpack.encode((address, LeaseAddress(f"{here}/{lease}", token))))
                )
                there.hear()
                os.ftruncate(memory, 0)
                there.say(handoff.Grant(self._chooser.getrandbits(62), struct.pack("<2i", 1, 2), 0))
                self._end(there)
        finally:
            os.close(memory)
            os.close(lease)
        return 2

    def _dial(self) -> Hostile:
        return Hostile.dial(self._port)

    def _end(self, there: Hostile) -> None:
        """Most wait for the other side; some are simply gone."""
        if self._chooser.random() < 0.8:
            there.finish()

    def _hello(
        self,
        there: Hostile,
        *,
        key: ClusterKey = KEY,
        pages: int = LAYOUT.pages,
        transports: tuple[str, ...] = ("tcp", "shm"),
    ) -> None:
        challenge = there.hear()
        assert isinstance(challenge, handoff.Challenge)
        nonce = self._chooser.randbytes(handoff.NONCE_BYTES)
        layout = msgspec.structs.replace(LAYOUT, pages=pages)
        hello = handoff.Hello(handoff.VERSION, nonce, b"", "hostile", self._inventor.integer(), layout, transports)
        proof = key.mac("handoff-decode", challenge.nonce, nonce, hello.signed())
        there.say(msgspec.structs.replace(hello, proof=proof))

    def _reach(self, there: Hostile) -> None:
        """The rest of the handshake, over a lane that leads nowhere."""
        there.hear()
        token = self._chooser.randbytes(16)
        with self._dial() as lane:
            self._lane(lane, token)
            lane.hear()
            there.say(handoff.Offer("tcp", token))
            there.hear()

    def _lane(self, lane: Hostile, token: bytes, *, key: ClusterKey = KEY) -> None:
        challenge = lane.hear()
        assert isinstance(challenge, handoff.Challenge)
        nonce = self._chooser.randbytes(handoff.NONCE_BYTES)
        lane.say(handoff.Lane(nonce, key.mac("handoff-lane", challenge.nonce, nonce, token), token))


class HostilePrefill:
    """Listens where decode is told that a prefill worker is, and breaks every rule that it can."""

    def __init__(self, seed: int, sent: Callable[[str, int], None], rooms: Callable[[], Sequence[int]]) -> None:
        self._chooser = random.Random(f"prefill {seed}")
        self._sent = sent
        self._rooms = rooms
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="hostile-prefill", daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(sock, self._chooser.getrandbits(32)), daemon=True).start()

    def _serve(self, sock: socket.socket, seed: int) -> None:
        chooser = random.Random(seed)
        with Hostile(sock) as there, suppress(Gone, *UNDECODABLE):
            name, frames = self._attack(there, chooser)
            self._sent(f"decode: {name}", frames)
            there.finish()

    def _attack(self, there: Hostile, chooser: random.Random) -> tuple[str, int]:
        inventor = Inventor(chooser, self._rooms())
        nonce = chooser.randbytes(handoff.NONCE_BYTES)
        kind = chooser.randrange(10)
        if kind == 0:
            there.write(inventor.noise(3000))
            return "noise", 1
        if kind == 1:
            data = b"".join(framed(inventor.message()) for _ in range(3))
            there.write(inventor.mutated(data) if chooser.random() < 0.5 else data)
            return "strange messages", 3
        there.say(handoff.Challenge(handoff.VERSION, nonce))
        said = there.hear()
        if isinstance(said, handoff.Lane):
            there.say(handoff.LaneOpen(KEY.mac("handoff-lane-open", said.nonce, nonce, said.token)))
            return "odd lanes", self._lane(there, chooser)
        assert isinstance(said, handoff.Hello)
        key = KEY if kind > 2 else ClusterKey(chooser.randbytes(32))
        proof = key.mac("handoff-prefill", said.nonce, nonce)
        names = ("tcp",) if kind < 8 else (*said.transports, "other")
        there.say(handoff.Welcome(proof, "hostile", chooser.randrange(1 << 40), names))
        if key is not KEY:
            there.say(*(inventor.message() for _ in range(3)))
            return "wrong proof", 4
        there.hear()
        there.say(handoff.Reached())
        return "odd sessions", self._session(there, chooser, inventor)

    def _lane(self, lane: Hostile, chooser: random.Random) -> int:
        """Stripes for rooms that are unknown, over, or somebody else's; too many pages; noise. Most stay silent."""
        frames = 0
        if chooser.random() < 0.75:
            lane.linger()
            return frames
        for _ in range(chooser.randrange(1, 8)):
            room = chooser.choice((*self._rooms(), chooser.randrange(1 << 62)))
            first, count = chooser.choice(((0, 1), (0, 0), (5, 2), (0, 0xFFFFFFFF), (0xFFFFFFFF, 1)))
            lane.write(_FRAME.pack(room, first, count) + chooser.randbytes(min(count, 2) * LAYOUT.bytes_per_page))
            frames += 1
        lane.write(chooser.randbytes(chooser.randrange(100)))
        return frames

    def _session(self, there: Hostile, chooser: random.Random, inventor: Inventor) -> int:
        """Answers a grant as it pleases."""
        frames, mine = 0, list[int]()
        for _ in range(chooser.randrange(1, 12)):
            said = there.hear()
            if isinstance(said, handoff.Grant):
                mine.append(said.room)
            room = chooser.choice((*mine, inventor.room()))
            count = chooser.randrange(1, 20)
            there.say(*(self._odd(room, chooser, inventor) for _ in range(count)))
            frames += count
        there.say(inventor.message())
        return frames + 1

    def _odd(self, mine: int, chooser: random.Random, inventor: Inventor) -> Message:
        room = chooser.choice((mine, inventor.room()))
        odd: Sequence[Callable[[], Message]] = (
            lambda: handoff.Chunk(room, chooser.choice((1, 2, inventor.integer()))),
            lambda: handoff.Last(room, chooser.choice((1, 2, inventor.integer())), [bytes(64)]),
            lambda: handoff.Stop(room, inventor.text()),
            lambda: handoff.Stopped(room),
        )
        return chooser.choice(odd)()


class Recorder:
    """Between decode and prefill for one hand-off: what decode says, connection by connection."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._streams: list[bytearray] = []
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def finish(self) -> list[bytes]:
        """Ends all connections; what decode said on each."""
        for sock in (self._listener, *self._sockets):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        return [bytes(stream) for stream in self._streams]

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target), ANSWER_TIMEOUT_S)
                far.settimeout(None)
                self._sockets += [near, far]
                stream = bytearray()
                self._streams.append(stream)
                threading.Thread(target=self._pump, args=(near, far, stream), daemon=True).start()
                threading.Thread(target=self._pump, args=(far, near, bytearray()), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, kept: bytearray) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                kept += data
                target.sendall(data)


@dataclass
class _Vitals:
    rss_bytes: int
    descriptors: int


class Victims:
    """The two workers, and the hand-offs that go on between them all the time. For one thread, but for `rooms`."""

    def __init__(self, setting: Setting, chooser: random.Random) -> None:
        self._deadlines = setting.deadlines
        self._prefill = Worker(setting, "prefill-0")
        self._decode = Worker(setting, "decode")
        self._chooser = chooser
        self._live: dict[int, tuple[Try, float]] = {}
        self._hostile: dict[int, float] = {}
        self._counted: list[Counted] = []
        self._ended: Counter[str] = Counter()
        self.limit_s = setting.deadlines.handoff_s + MARGIN_S
        self.problems: list[str] = []
        self.counts: Counter[str] = Counter()
        self.slowest_s = 0.0
        self.rooms: tuple[int, ...] = ()
        """Legitimate rooms in flight, for those who want to harm them."""

    @property
    def port(self) -> int:
        return self._prefill.port

    def close(self) -> None:
        self._prefill.end()
        self._decode.end()

    def turn(self, hostile_port: int | None, *, busy: bool = True) -> None:
        """One look: keeps hand-offs in flight, takes what ended."""
        if busy:
            while len(self._live) < LEGITIMATE:
                self.begin(self.port)
            while hostile_port is not None and len(self._hostile) < HOSTILE_ROOMS:
                attempt = self._attempt()
                self._hostile[attempt.room] = time.monotonic()
                self._decode.tell(Open(attempt, hostile_port, None))
        for worker in (self._prefill, self._decode):
            for said in worker.heard():
                self._hear(worker, said)
            if not worker.alive():
                self.counts["crashes"] += 1
                self.problems.append(f"{worker.name} died")
                raise Died(worker.name)
        now_s = time.monotonic()
        for room, (_, began_s) in list(self._live.items()):
            if now_s - began_s > self.limit_s:
                self.counts["hangs"] += 1
                self.problems.append(f"legitimate room {room} not over")
                del self._live[room]
        for room, began_s in list(self._hostile.items()):
            if now_s - began_s > self.limit_s + 2 * self._deadlines.connect_s + self._deadlines.fence_s:
                self.counts["hangs"] += 1
                self.problems.append(f"room {room} of the hostile prefill worker not over")
                del self._hostile[room]
        self.rooms = tuple(self._live)

    def begin(self, port: int) -> None:
        attempt = self._attempt()
        self._live[attempt.room] = attempt, time.monotonic()
        self._decode.tell(Open(attempt, port, None))
        self._prefill.tell(Offer(attempt))

    def record(self) -> list[bytes]:
        """What decode says in one legitimate hand-off."""
        recorder = Recorder(self.port)
        self.begin(recorder.port)
        self.settle()
        return recorder.finish()

    def settle(self) -> None:
        """Until nothing is in flight any more."""
        while self._live or self._hostile:
            self.turn(None, busy=False)
            time.sleep(0.002)

    def count_pages(self) -> None:
        """Every page of both pools: free again, and decode's with their canaries."""
        self._counted.clear()
        for worker in (self._prefill, self._decode):
            worker.tell(Census())
        deadline_s = time.monotonic() + self.limit_s
        while len(self._counted) < 2:
            self.turn(None, busy=False)
            time.sleep(0.002)
            if time.monotonic() > deadline_s:
                self.counts["hangs"] += 1
                self.problems.append("a worker does not answer")
                return
        for counted in self._counted:
            self.counts["wrong_bytes"] += counted.wrong_bytes
            self.counts["leaked_pages"] += counted.leaked_pages

    def vitals(self) -> dict[str, _Vitals]:
        found = {}
        for worker in (self._prefill, self._decode):
            process = psutil.Process(worker.pid)
            found[worker.name] = _Vitals(process.memory_info().rss, process.num_fds())
        return found

    def _attempt(self) -> Try:
        chooser = self._chooser
        return Try(
            room=chooser.getrandbits(62),
            fault="none",
            prefill=0,
            chunks=tuple(chooser.randrange(1, 6) for _ in range(chooser.randrange(1, 4))),
            prefix_tokens=0,
            gap_s=0.002,
            decode_aborts_s=None,
            prefill_aborts_s=None,
            finished=True,
            kept_s=0.01,
        )

    def _hear(self, worker: Worker, said: Any) -> None:
        match said:
            case Ended(room, state, reason, wrong_bytes) if worker is self._decode:
                if self._hostile.pop(room, None) is not None:
                    return  # Its pages hold what the hostile worker pleased to write.
                if room not in self._live:
                    return
                _, began_s = self._live.pop(room)
                self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)
                self.counts["legit_handoffs"] += state == "DONE"
                self.counts["wrong_bytes"] += wrong_bytes
                if state != "DONE":
                    self.counts["legit_failed"] += 1
                    self.problems.append(f"legitimate room failed: {reason}")
                    self._prefill.tell(GiveUp(room))
            case Hung(room, state):
                self.counts["hangs"] += 1
                self.problems.append(f"{worker.name} {room} in {state}")
            case Counted():
                self._counted.append(said)


class Died(Exception):
    """A victim is gone; there is nothing left to attack."""


@dataclass
class Sent:
    """Frames by attack, from all threads."""

    wanted: int
    counts: Counter[str] = field(default_factory=Counter)
    broken: list[BaseException] = field(default_factory=list)
    """What ended an attacker that should not have ended."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, frames: int) -> None:
        with self._lock:
            self.counts[name] += frames

    @property
    def total(self) -> int:
        with self._lock:
            return self.counts.total()

    @property
    def enough(self) -> bool:
        return self.total >= self.wanted


def _attack(attacker: AgainstPrefill, sent: Sent, ended: threading.Event) -> None:
    while not sent.enough and not ended.is_set():
        try:
            name, frames = attacker.attack()
        except Gone:
            name, frames = "cut short", 1
        sent.add(name, frames)


@contextmanager
def victims(transport: str, seed: int, deadlines: Deadlines) -> Iterator[tuple[Victims, Path]]:
    """Both workers and the folder of their logs, all gone afterwards."""
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mainstem-fuzz-")))
        made = Victims(Setting(tuple(dict.fromkeys((transport, "tcp"))), seed, deadlines, logs), random.Random(seed))
        stack.callback(made.close)
        yield made, logs


def fuzz(transport: str, frames: int, seed: int, deadlines: Deadlines = DEADLINES) -> dict[str, Any]:
    """So many frames against one pair of workers, whose own hand-offs go over `transport`."""
    with victims(transport, seed, deadlines) as (pair, logs), ExitStack() as stack:
        sent, ended = Sent(frames), threading.Event()
        recorded = pair.record()
        hostile = HostilePrefill(seed, sent.add, lambda: pair.rooms)
        stack.callback(hostile.close)
        stack.callback(ended.set)
        for number in range(ATTACKERS):
            attacker = AgainstPrefill(pair.port, seed + number, recorded)
            threading.Thread(target=_attack, args=(attacker, sent, ended), daemon=True).start()
        before: dict[str, _Vitals] = {}
        after: dict[str, _Vitals] = {}
        began_s = said_s = time.monotonic()
        try:
            while not sent.enough:
                pair.turn(hostile.port)
                time.sleep(0.002)
                if not before and sent.total >= WARM_FRAMES * frames:
                    before = pair.vitals()
                if time.monotonic() - said_s > 5:
                    said_s = time.monotonic()
                    done = pair.counts["legit_handoffs"]
                    report.progress(
                        f"  {said_s - began_s:5.0f} s  {transport}: {sent.total} of {frames} frames, {done} hand-offs"
                    )
            pair.settle()
            quiet_s = time.monotonic() + 2 * deadlines.connect_s + deadlines.memory_s + 1
            while time.monotonic() < quiet_s:
                pair.turn(None, busy=False)
                time.sleep(0.01)
            pair.count_pages()
            after = pair.vitals()
        except Died:
            after = before
        lines = untaken(logs)
        for line, count in Counter(lines).most_common(10):
            report.progress(f"  nobody took, {count} times: {line}")
        for problem, count in Counter(pair.problems).most_common(10):
            report.progress(f"  {count} times: {problem}")
        names = ("crashes", "hangs", "wrong_bytes", "leaked_pages", "legit_handoffs", "legit_failed")
        return {
            "frames": sent.total,
            **{name: pair.counts[name] for name in names},
            "rss_growth_bytes": max((after[name].rss_bytes - before[name].rss_bytes for name in before), default=0),
            "fd_growth": max((after[name].descriptors - before[name].descriptors for name in before), default=0),
            "untaken": len(lines),
            "slowest_legit_s": round(pair.slowest_s, 3),
            "took_s": round(time.monotonic() - began_s, 1),
            "attacks": dict(sent.counts),
        }


def main() -> None:
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--frames", type=int, default=100_000, help="in all (default 100000)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    parts = {name: fuzz(name, options.frames // 2, options.seed) for name in ("shm", "tcp")}
    sums = ("frames", "crashes", "hangs", "wrong_bytes", "leaked_pages", "legit_handoffs", "legit_failed", "untaken")
    worst = ("rss_growth_bytes", "fd_growth", "slowest_legit_s")
    result: dict[str, Any] = {name: sum(part[name] for part in parts.values()) for name in sums}
    result |= {name: max(part[name] for part in parts.values()) for name in worst}
    rows = [[name, *(part[key] for key in (*sums, *worst))] for name, part in parts.items()]
    report.publish(
        {**result, "transports": parts, "seed": options.seed}, ("transport", *sums, *worst), rows, options.json
    )
    sys.exit(
        1
        if any(result[name] for name in ("crashes", "hangs", "wrong_bytes", "leaked_pages", "legit_failed", "untaken"))
        else 0
    )


if __name__ == "__main__":
    main()
