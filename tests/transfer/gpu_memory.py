"""KV pools on a GPU, for tests: filled with patterns, read back to be compared."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from transfer.cuda import Device
from transfer.layout import PoolLayout
from transfer.pool import Pool

Bytes = npt.NDArray[np.uint8]


class GpuMemory:
    """A pool whose buffers are allocations of their own, as torch makes them for large tensors."""

    def __init__(self, device: Device, layout: PoolLayout) -> None:
        self._device = device
        self._pointers = [device.allocate(layout.pages * size) for size in layout.page_bytes]
        self.layout = layout
        self.pool = Pool.at(layout, self._pointers)

    def fill(self, byte: int) -> None:
        for pointer, size in zip(self._pointers, self.layout.page_bytes, strict=True):
            self._device.upload(pointer, np.full(self.layout.pages * size, byte, np.uint8))

    def pattern(self) -> None:
        """Every page of every buffer says which it is."""
        for number, (pointer, size) in enumerate(zip(self._pointers, self.layout.page_bytes, strict=True)):
            words = np.empty((self.layout.pages, size // 4), np.uint32)
            words[:] = np.arange(self.layout.pages, dtype=np.uint32)[:, None] * 64 + number + 1
            words[:, 1::2] += np.arange(size // 8, dtype=np.uint32) << 20
            self._device.upload(pointer, words)

    def read(self) -> list[Bytes]:
        """Of each buffer, shape (pages, bytes of one page)."""
        found = []
        for pointer, size in zip(self._pointers, self.layout.page_bytes, strict=True):
            pages = np.empty((self.layout.pages, size), np.uint8)
            self._device.download(pointer, pages)
            found.append(pages)
        return found

    def free(self) -> None:
        for pointer in self._pointers:
            self._device.free(pointer)
