"""The memory that pages are moved from and to, written to once before anything is timed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from benchmarks.ways.cell import Cell
from transfer.plan import Pages
from transfer.pool import Pool, SharedAddress, SharedArena

Bytes = npt.NDArray[np.uint8]

_ODD = np.uint64(0x9E3779B97F4A7C15)
_WIPED = 0xA5


class WrongByte(Exception):
    """A page landed that is not the one that was sent."""


def pattern(size_bytes: int) -> Bytes:
    """Memory in which every 8 bytes differ from all others, so that any mix-up shows. The same in every process."""
    words = np.arange(size_bytes // 8, dtype=np.uint64)
    words *= _ODD
    return words.view(np.uint8)


def over(memory: Bytes, cell: Cell) -> Pool:
    """A pool of this cell's layout, at the start of this memory."""
    layout = cell.layout
    return Pool(layout, [memory[: layout.pages * cell.page_bytes].reshape(layout.pages, cell.page_bytes)])


def shared_memory(size_bytes: int) -> tuple[Bytes, SharedAddress]:
    """Memory that other processes of this host can map, as a decode worker's tensors are. Zeroed, not touched yet."""
    arena = SharedArena()
    (mapped,) = arena.allocate([size_bytes])
    memory = np.frombuffer(mapped, np.uint8)
    address = arena.address_of([memory.ctypes.data])
    assert address is not None, "the buffer lies in the arena"
    return memory, address


class DecodeMemory:
    """What the decode process holds, `size_bytes` of each."""

    def __init__(self, size_bytes: int) -> None:
        self.shared, self.address = shared_memory(size_bytes)
        """In the mapping that a prefill process of this host may write to."""
        self.private: Bytes = np.empty(size_bytes, np.uint8)
        self.source = pattern(size_bytes)
        """What the prefill process holds, to compare with."""
        for memory in (self.shared, self.private):
            memory[:] = 0


def wipe(pool: Pool, pages: Pages) -> None:
    """Nothing that landed earlier can pass for what lands next."""
    for page in pages.tolist():
        pool.buffers[0][page] = _WIPED


def compare(landed: Pool, destination: Pages, sent: Pool, source: Pages) -> None:
    """Raises WrongByte."""
    for there, here in zip(destination.tolist(), source.tolist(), strict=True):
        if not np.array_equal(landed.buffers[0][there], sent.buffers[0][here]):
            raise WrongByte(f"page {there}: wanted the bytes of page {here}, found others")
