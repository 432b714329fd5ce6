"""What a GPU tells a process of another GPU's pages: records in host memory, one for each piece of work, in order.

    byte   0      token, by which the writer knows that it found the right memory
          64      how many records the reader has taken, by which the writer knows which may be overwritten
        4096      records of two words: the sequence's low 16 bits and the tag's low 48; the same 16 bits, the pages'
                  32 and the tag's high 16. Sequences begin at 1

The writer's kernel writes a record when its pages are in place; the reader looks, and waits for no stream of its own.
Each word says by itself whether it is the record's, so a GPU writes both at once: to wait until the host has one before
it writes the other takes more than a microsecond. A place is used again for a sequence that is RECORDS higher.
"""

from __future__ import annotations

import mmap
import os
import secrets

import msgspec
import numpy as np

from transfer import memfd

RECORDS = 1024
RECORD_BYTES = 16
_TOKEN_BYTES = 32
_TAKEN_AT, _RECORDS_AT = 64, 4096
SIZE_BYTES = _RECORDS_AT + RECORDS * RECORD_BYTES
_TAKEN, _RECORDS = _TAKEN_AT // 8, _RECORDS_AT // 8
"""The same in words, which are read one by one, as Python's own memory: numpy takes ten times as long."""
_RECORD_WORDS = RECORD_BYTES // 8
_16_BITS, _32_BITS, _48_BITS = 0xFFFF, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF


class RingAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where a process of this host finds a ring."""

    path: str
    token: bytes


class NoRing(Exception):
    """The address leads to no ring, or another one."""


def record(sequence: int, tag: int, pages: int) -> tuple[int, int]:
    """The two words of a record. tag: 64 bits; pages: 32"""
    both = (sequence & _16_BITS) << 48
    return both | tag & _48_BITS, both | pages << 16 | tag >> 48


def _mapped(descriptor: int) -> memoryview:
    """A ring's memory in words, mapped for as long as anybody has it."""
    return memoryview(mmap.mmap(descriptor, SIZE_BYTES)).cast("Q")


class RingReader:
    """Decode's end. For one thread."""

    def __init__(self) -> None:
        self._descriptor = memfd.create("mainstem-landed", SIZE_BYTES)
        token = secrets.token_bytes(_TOKEN_BYTES)
        self._words = _mapped(self._descriptor)
        self._words.cast("B")[:_TOKEN_BYTES] = token
        self._next = 1
        self.address = RingAddress(memfd.path_of(self._descriptor), token)

    def take(self) -> list[tuple[int, int]]:
        """Tag and pages of what has landed since the last call, in order."""
        found = []
        while True:
            place, expected = _RECORDS + (self._next - 1) % RECORDS * _RECORD_WORDS, self._next & _16_BITS
            second = self._words[place + 1]
            if second >> 48 != expected:
                break
            first = self._words[place]
            if first >> 48 != expected:
                break
            found.append((first & _48_BITS | (second & _16_BITS) << 48, second >> 16 & _32_BITS))
            self._next += 1
        if found:
            self._words[_TAKEN] = self._next - 1
        return found

    def close(self) -> None:
        """The memory goes with the last process that has it."""
        os.close(self._descriptor)


class RingWriter:
    """Prefill's end: it says where the next record goes, and its GPU writes there."""

    def __init__(self, address: RingAddress) -> None:
        """Raises NoRing."""
        try:
            descriptor = memfd.open_at(address.path, SIZE_BYTES)
        except memfd.NoMemory as error:
            raise NoRing(f"ring: {error}") from error
        try:
            self._words = _mapped(descriptor)
        finally:
            os.close(descriptor)
        if self._words.cast("B")[:_TOKEN_BYTES] != address.token:
            raise NoRing("ring: not the peer's")
        self.pointer = int(np.frombuffer(self._words, np.uint64).ctypes.data)
        """Where the whole of it begins in this process. A multiple of a memory page."""
        self._sequence = 0

    @property
    def full(self) -> bool:
        """Whether the next record would take the place of one that nobody has read."""
        return self._sequence - self._words[_TAKEN] >= RECORDS

    def next(self) -> tuple[int, int]:
        """Sequence of the next record, and its place in bytes from the ring's beginning. Only where there is room."""
        self._sequence += 1
        return self._sequence, _RECORDS_AT + (self._sequence - 1) % RECORDS * RECORD_BYTES
