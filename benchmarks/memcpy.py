"""The baseline of every hand-off: one thread of one process copies the same pages between two private pools.

Nothing that moves pages with one copy and one thread can be faster.
"""

from __future__ import annotations

import ctypes
import time

from benchmarks.ways.cell import Cell
from benchmarks.ways.memory import DecodeMemory, compare, over, wipe
from benchmarks.ways.sample import Sample


def measure(cell: Cell, memory: DecodeMemory, seed: int) -> Sample:
    """Raises WrongByte."""
    source_pool, destination_pool = over(memory.source, cell), over(memory.private, cell)
    here, there = source_pool.buffers[0].ctypes.data, destination_pool.buffers[0].ctypes.data
    page_bytes = cell.page_bytes
    took_s: list[float] = []
    cpu_s = 0.0
    for repetition in range(cell.repetitions):
        source, destination = cell.choose(seed, repetition)
        checked = repetition in (0, cell.repetitions - 1)
        if checked:
            wipe(destination_pool, destination)
        pairs = list(zip(source.tolist(), destination.tolist(), strict=True))
        cpu_before_s = time.process_time()
        began_s = time.monotonic()
        for source_page, destination_page in pairs:
            ctypes.memmove(there + destination_page * page_bytes, here + source_page * page_bytes, page_bytes)
        took_s.append(time.monotonic() - began_s)
        cpu_s += time.process_time() - cpu_before_s
        if checked:
            compare(destination_pool, destination, source_pool, source)
    return Sample.of(took_s, cpu_s, cell)
