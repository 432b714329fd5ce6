"""How prefill's thread tells decode's that a hand-off is over, for ways whose own word would come later: a record in
the ring that `transfer.nvlink` has its GPU write (transfer/landed_ring.py), written by the processor."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

from benchmarks.ways.ends import WAIT_S, HandOffFailed
from transfer.landed_ring import RECORD_BYTES, RingReader, RingWriter, record


def tell(ring: RingWriter) -> None:
    """Only once the pages can be read on the other side."""
    offset, last = begin_to_tell(ring)
    ctypes.c_uint32.from_address(ring.pointer + offset).value = last


def begin_to_tell(ring: RingWriter) -> tuple[int, int]:
    """All of a record of no pages but its last 32 bits: where those belong, from the ring's beginning, and what they
    are."""
    sequence, offset = ring.next()
    first, second = record(sequence, 0, 0)
    ctypes.c_uint64.from_address(ring.pointer + offset).value = first
    return offset + RECORD_BYTES - 4, second >> 32


def wait_until_told(ring: RingReader, meanwhile: Callable[[], object] = lambda: None) -> float:
    """Spins. Returns the moment at which the record was there, in monotonic seconds. Raises HandOffFailed.

    meanwhile  called in every turn
    """
    deadline_s = time.monotonic() + WAIT_S
    while not ring.take():
        meanwhile()
        if time.monotonic() > deadline_s:
            raise HandOffFailed(f"not over after {WAIT_S:g} s")
    return time.monotonic()
