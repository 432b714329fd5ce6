"""How far a GPU has computed: a count in host memory that grows by one with each layer of each forward pass.

    the scheduler's thread    tell(stream, count)    the stream writes the count once all that was put into it is done
    a stream that copies      hold(stream, count)    it goes no further until the count has been reached
    anybody                   reached(count)

The GPU waits for it by itself: nobody has to be awake when a layer is done. A count is a number of 32 bits that wraps.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from transfer.cuda import Device

_WRAP = 1 << 32


class LayerCount:
    """One for each process that computes. Raises CudaFailed where the GPU cannot see host memory."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._word = np.frombuffer(self._memory, np.uint32)[:1]
        self._pointer = device.map_host(int(self._word.ctypes.data), mmap.PAGESIZE)

    def close(self) -> None:
        """Once no stream tells or waits any more: tests have several, one after the other."""
        self._device.unmap_host(int(self._word.ctypes.data))

    def tell(self, stream: Any, count: int) -> None:
        self._device.write_word(stream, self._pointer, count % _WRAP)

    def hold(self, stream: Any, count: int) -> None:
        self._device.wait_for_word(stream, self._pointer, count % _WRAP)

    def reached(self, count: int) -> bool:
        return (int(self._word[0]) - count) % _WRAP < _WRAP // 2
