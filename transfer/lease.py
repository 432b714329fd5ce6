"""A writer's leave to write into memory that it has mapped, which the memory's owner can take back.

A mapping cannot be taken from a process. So the writer asks before each copy and holds a lock
while it copies; the owner withdraws the leave, then waits until it gets the lock. A writer that
was killed holds no lock: the kernel lets go of it. One that is frozen in the middle of a copy
keeps it, and the owner keeps its pages back until that process goes on or dies.

    writer   lock shared ─> withdrawn? ─> copy ─> unlock
    owner    withdraw ─> lock alone, not waiting ─> again, until it holds it

The lease is a memfd of its own for each connection: it needs no name and no cleaning up.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from transfer import memfd

_TOKEN_BYTES = 32
_GIVEN, _WITHDRAWN = b"\x01", b"\x00"
_SIZE_BYTES = len(_GIVEN) + _TOKEN_BYTES


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
        return True

    def close(self) -> None:
        """Only after `withdraw` said True: a writer would not notice."""
        os.close(self._descriptor)


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

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Raises Withdrawn. Inside, the memory is the writer's."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            raise Withdrawn("the owner of the memory has withdrawn the leave to write") from error
        try:
            if os.pread(self._descriptor, 1, 0) != _GIVEN:
                raise Withdrawn("the owner of the memory has withdrawn the leave to write")
            yield
        finally:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._descriptor)
