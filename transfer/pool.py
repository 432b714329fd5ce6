"""A worker's KV pool as bytes: views of its pages, and a mapping that a process of the same host can write.

SGLang's own tensors live in the mapping (`SharedArena.allocate`), so a page that a
peer writes is where the decode kernel reads it, and nobody copies it again. The
mapping is a memfd (transfer/memfd.py). A peer of the same user and host opens it
through /proc, and knows it by a token at its start.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import msgspec
import numpy as np
import numpy.typing as npt

from transfer import memfd
from transfer.layout import PoolLayout
from transfer.plan import Pages, runs

Bytes = npt.NDArray[np.uint8]
"""A buffer's pages, shape (pages, bytes of one page)."""

TOKEN_BYTES = 32
_HEADER_BYTES = mmap.PAGESIZE
"""The token has a memory page of its own, so that tensors start aligned."""


class SharedAddress(msgspec.Struct, frozen=True, array_like=True):
    """Where a process of this host finds a pool. Travels in a handshake; useless on another host."""

    path: str
    token: bytes
    size_bytes: int
    offsets: tuple[int, ...]
    """Start of each buffer, in bytes from the start of the mapping."""


class NotShared(Exception):
    """The address does not lead to the peer's memory from here; another transport is needed."""


class SharedArena:
    """A growing list of mappings that this process shares. One mapping for each pool."""

    def __init__(self) -> None:
        self._mappings: list[_Mapping] = []

    def allocate(self, sizes_bytes: Sequence[int]) -> list[memoryview]:
        """Zeroed memory of these sizes, each aligned to a memory page, together in one mapping."""
        mapping = _Mapping.create(sizes_bytes)
        self._mappings.append(mapping)
        return [
            memoryview(mapping.memory)[start : start + size]
            for start, size in zip(mapping.offsets, sizes_bytes, strict=True)
        ]

    def pool(self, layout: PoolLayout) -> tuple[Pool, SharedAddress]:
        """A zeroed pool in a mapping of its own, and where another process finds it."""
        sizes = [layout.pages * page_bytes for page_bytes in layout.page_bytes]
        buffers = [np.frombuffer(memory, np.uint8) for memory in self.allocate(sizes)]
        address = self.address_of([buffer.ctypes.data for buffer in buffers])
        assert address is not None, "the buffers lie in the mapping"
        shaped = [buffer.reshape(layout.pages, size) for buffer, size in zip(buffers, layout.page_bytes, strict=True)]
        return Pool(layout, shaped), address

    def address_of(self, pointers: Sequence[int]) -> SharedAddress | None:
        """The address of the mapping that holds all these buffers; None where one lies elsewhere."""
        for mapping in self._mappings:
            offsets = tuple(pointer - mapping.base for pointer in pointers)
            if all(0 < offset < mapping.size_bytes for offset in offsets):
                return SharedAddress(mapping.path, mapping.token, mapping.size_bytes, offsets)
        return None


@dataclass(frozen=True)
class _Mapping:
    memory: mmap.mmap
    descriptor: int
    token: bytes
    offsets: tuple[int, ...]

    @classmethod
    def create(cls, sizes_bytes: Sequence[int]) -> Self:
        offsets, end = [], _HEADER_BYTES
        for size in sizes_bytes:
            offsets.append(end)
            end += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        descriptor = memfd.create("mainstem-kv", end)
        memory = mmap.mmap(descriptor, end)
        token = secrets.token_bytes(TOKEN_BYTES)
        memory[:TOKEN_BYTES] = token
        return cls(memory, descriptor, token, tuple(offsets))

    @property
    def size_bytes(self) -> int:
        return len(self.memory)

    @property
    def base(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    @property
    def path(self) -> str:
        return memfd.path_of(self.descriptor)


class Pool:
    """The pages of one pool, as arrays that share its memory."""

    def __init__(self, layout: PoolLayout, buffers: list[Bytes]) -> None:
        self.layout = layout
        self.buffers = buffers

    @classmethod
    def at(cls, layout: PoolLayout, pointers: Sequence[int]) -> Self:
        """The pool whose buffers start at these addresses of this process. They must outlive it."""
        return cls(
            layout,
            [
                np.ctypeslib.as_array((ctypes.c_uint8 * (layout.pages * page_bytes)).from_address(pointer)).reshape(
                    layout.pages, page_bytes
                )
                for pointer, page_bytes in zip(pointers, layout.page_bytes, strict=True)
            ],
        )

    @classmethod
    def zeros(cls, layout: PoolLayout) -> Self:
        """A pool of its own memory: for tests and benchmarks."""
        return cls(layout, [np.zeros((layout.pages, page_bytes), np.uint8) for page_bytes in layout.page_bytes])

    @classmethod
    def open_shared(cls, layout: PoolLayout, address: SharedAddress) -> Self:
        """A peer's pool, mapped here. Raises NotShared, with the reason, where it cannot be reached."""
        try:
            descriptor = memfd.open_at(address.path, address.size_bytes)
        except memfd.NoMemory as error:
            raise NotShared(str(error)) from error
        try:
            if os.pread(descriptor, TOKEN_BYTES, 0) != address.token:
                raise NotShared(f"{address.path}: not the peer's memory")
            memory = mmap.mmap(descriptor, address.size_bytes)
        except (OSError, ValueError) as error:
            raise NotShared(f"{address.path}: {error}") from error
        finally:
            os.close(descriptor)
        whole = np.frombuffer(memory, np.uint8)
        if len(address.offsets) != len(layout.page_bytes):
            raise NotShared(f"offsets: wanted {len(layout.page_bytes)}, found {len(address.offsets)}")
        buffers = []
        for offset, page_bytes in zip(address.offsets, layout.page_bytes, strict=True):
            end = offset + layout.pages * page_bytes
            if not 0 < offset < end <= address.size_bytes:
                raise NotShared(f"offsets: wanted buffers within {address.size_bytes} bytes, found one ending at {end}")
            buffers.append(whole[offset:end].reshape(layout.pages, page_bytes))
        return cls(layout, buffers)

    def copy_to(self, other: Pool, source: Pages, destination: Pages) -> None:
        """Copies pages of this pool to as many of `other`, buffer by buffer."""
        neighbours = np.count_nonzero((np.diff(source) == 1) & (np.diff(destination) == 1))
        if 2 * neighbours < len(source):
            pairs = list(zip(source.tolist(), destination.tolist(), strict=True))
            for mine, theirs in zip(self.buffers, other.buffers, strict=True):
                for here, there in pairs:
                    theirs[there] = mine[here]
            return
        for mine, theirs in zip(self.buffers, other.buffers, strict=True):
            for here, there, pages in runs(source, destination):
                theirs[there : there + pages] = mine[here : here + pages]

    def views(self, starts_and_counts: Sequence[tuple[int, int]]) -> list[memoryview]:
        """The bytes of these runs of pages, buffer by buffer: what goes over a socket."""
        return [
            buffer[start : start + count].reshape(-1).data
            for buffer in self.buffers
            for start, count in starts_and_counts
        ]
