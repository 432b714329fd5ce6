"""How prefill's thread tells decode's that a hand-off is over, for ways whose own word would come later: a record in
the ring that `transfer.nvlink` has its GPU write (transfer/landed_ring.py), written by the processor."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

from benchmarks.ways.ends import WAIT_S, HandOffFailed
from transfer.landed_ring import RingReader, RingWriter

SEQUENCE_AT = 16
"""Of a record in the ring, in bytes."""


def tell(ring: RingWriter) -> None:
    """Only once the pages can be read on the other side."""
    sequence, offset = ring.next()
    ctypes.c_uint64.from_address(ring.pointer + offset + SEQUENCE_AT).value = sequence


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
