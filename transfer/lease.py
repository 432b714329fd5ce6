"""A writer's leave to write into memory that it has mapped, which the memory's owner can take back.

A mapping cannot be taken from a process. So the writer asks before each copy and holds a lock
while it copies; the owner withdraws the leave, then waits until it gets the lock. A writer that
was killed holds no lock: the kernel lets go of it. One that is frozen in the middle of a copy
keeps it, and the owner keeps its pages back until that process goes on or dies.

    writer   lock shared ─> withdrawn? ─> say so ─> copy ─> say that it is over ─> unlock
    owner    withdraw ─> lock alone, not waiting ─> nobody says that he copies? else is that process gone?

The last question is for what a process has set going: its GPU writes on for a moment after the kernel has let go of a
killed process's locks, but not after the process is gone altogether.

The lease is a memfd of its own for each connection: it needs no name and no cleaning up.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import mmap
import os
import secrets
import select
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from transfer import memfd

log = logging.getLogger(__name__)

_TOKEN_BYTES = 32
_WITHDRAW_AGAIN_S = 0.005
_SAY_AFTER_S = 1.0
_GIVEN, _WITHDRAWN = b"\x01", b"\x00"
_WRITER_AT = 40
_WRITER = struct.Struct("=QQ")
"""Process and when it began, of whoever copies."""
_NOBODY = _WRITER.pack(0, 0)
_SIZE_BYTES = _WRITER_AT + _WRITER.size


class LeaseAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where a process of this host finds a lease."""

    path: str
    token: bytes


class Withdrawn(Exception):
    """The owner of the memory took the leave back, or never gave it."""


class Lease:
    """The owner's end."""

    def __init__(self) -> None:
        self._descriptor = memfd.create("mainstem-lease", _SIZE_BYTES)
        token = secrets.token_bytes(_TOKEN_BYTES)
        os.pwrite(self._descriptor, _GIVEN + token, 0)
        self.address = LeaseAddress(memfd.path_of(self._descriptor), token)

    def withdraw(self) -> bool:
        """No copy begins any more. True once none is under way either; to be asked again until then."""
        os.pwrite(self._descriptor, _WITHDRAWN, 0)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        process, began = _WRITER.unpack(os.pread(self._descriptor, _WRITER.size, _WRITER_AT))
        return not process or _is_gone(process, began)

    def close(self) -> None:
        """Only after `withdraw` said True: a writer would not notice."""
        os.close(self._descriptor)

    async def take_back(self) -> None:
        """Withdraws the leave, waits until nobody copies any more, says so where that takes long, and closes."""
        began_s, said = time.monotonic(), False
        while not self.withdraw():
            if not said and time.monotonic() - began_s > _SAY_AFTER_S:
                said = True
                log.warning("pages kept back: a prefill process is frozen while it writes to them, until it goes on")
            await asyncio.sleep(_WITHDRAW_AGAIN_S)
        self.close()


class Leave:
    """The writer's end."""

    def __init__(self, address: LeaseAddress) -> None:
        """Raises Withdrawn where the address leads to no lease, or another one."""
        try:
            self._descriptor = memfd.open_at(address.path, _SIZE_BYTES)
        except memfd.NoMemory as error:
            raise Withdrawn(f"lease: {error}") from error
        if os.pread(self._descriptor, _TOKEN_BYTES, len(_GIVEN)) != address.token:
            os.close(self._descriptor)
            raise Withdrawn("lease: not the peer's")
        self._memory = mmap.mmap(self._descriptor, _SIZE_BYTES)
        """Looked at and written before and after each copy: a system call for each takes longer than a small copy's."""
        process = os.getpid()
        self._writer = _WRITER.pack(process, _began(process))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Raises Withdrawn. Inside, the memory is the writer's."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    def begin(self) -> None:
        """From here to `end` the memory is the writer's, also that of its GPU. Raises Withdrawn."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            raise Withdrawn("the owner of the memory has withdrawn the leave to write") from error
        if not self.given:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            raise Withdrawn("the owner of the memory has withdrawn the leave to write")
        self._say(self._writer)

    @property
    def given(self) -> bool:
        """Whether the owner has not withdrawn it."""
        return self._memory[:1] == _GIVEN

    def end(self) -> None:
        self._say(_NOBODY)
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _say(self, writer: bytes) -> None:
        self._memory[_WRITER_AT:_SIZE_BYTES] = writer

    def close(self) -> None:
        self._memory.close()
        os.close(self._descriptor)


def _began(process: int) -> int:
    """When it did, in ticks since the host did: another process of the same number has another one. 0: not known."""
    try:
        # The name, in brackets, may hold anything.
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _is_gone(process: int, began: int) -> bool:
    """Whether all of its threads have ended, and everything it had open is closed."""
    try:
        descriptor = os.pidfd_open(process)
    except OSError:
        return True
    try:
        if _began(process) not in (began, 0):
            return True
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))
    finally:
        os.close(descriptor)
