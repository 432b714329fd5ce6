"""KV pools on a GPU, for tests and benchmarks: filled with patterns, read back to be compared."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from transfer.cuda import Device
from transfer.layout import PoolLayout
from transfer.plan import Pages
from transfer.pool import Pool

Bytes = npt.NDArray[np.uint8]


class GpuMemory:
    """A pool whose buffers are allocations of their own, as torch makes them for large tensors."""

    def __init__(self, device: Device, layout: PoolLayout) -> None:
        self._device = device
        self.device_number = device.number
        self.pointers = [device.allocate(layout.pages * size) for size in layout.page_bytes]
        self.layout = layout
        self.pool = Pool.at(layout, self.pointers)

    def handles(self) -> list[bytes]:
        """By which another process opens each buffer."""
        return [self._device.share(self._device.allocation_of(pointer)) for pointer in self.pointers]

    def fill(self, byte: int) -> None:
        for pointer, size in zip(self.pointers, self.layout.page_bytes, strict=True):
            self._device.upload(pointer, np.full(self.layout.pages * size, byte, np.uint8))

    def wipe(self, pages: Pages) -> None:
        """Nothing that landed there earlier can pass for what lands next."""
        for pointer, size in zip(self.pointers, self.layout.page_bytes, strict=True):
            for page in pages.tolist():
                self._device.fill(pointer + page * size, 0xA5, size)

    def pattern(self) -> None:
        """Every page of every buffer says which it is."""
        every = np.arange(self.layout.pages)
        for number, (pointer, size) in enumerate(zip(self.pointers, self.layout.page_bytes, strict=True)):
            self._device.upload(pointer, _words(number, every, size))

    def expected(self, buffer: int, page: int) -> Bytes:
        """What `pattern` writes there, in whichever process."""
        words = _words(buffer, np.array([page]), self.layout.page_bytes[buffer])
        return np.frombuffer(words.tobytes(), np.uint8)

    def page(self, buffer: int, page: int) -> Bytes:
        """What is there."""
        size = self.layout.page_bytes[buffer]
        found = np.empty(size, np.uint8)
        self._device.download(self.pointers[buffer] + page * size, found)
        return found

    def read(self) -> list[Bytes]:
        """Of each buffer, shape (pages, bytes of one page)."""
        found = []
        for pointer, size in zip(self.pointers, self.layout.page_bytes, strict=True):
            pages = np.empty((self.layout.pages, size), np.uint8)
            self._device.download(pointer, pages)
            found.append(pages)
        return found

    def free(self) -> None:
        for pointer in self.pointers:
            self._device.free(pointer)


def _words(buffer: int, pages: npt.NDArray[np.int64], page_bytes: int) -> npt.NDArray[np.uint32]:
    """Shape (pages, words of a page)."""
    words = np.empty((len(pages), page_bytes // 4), np.uint32)
    words[:] = pages.astype(np.uint32)[:, None] * 64 + buffer + 1
    words[:, 1::2] += np.arange(page_bytes // 8, dtype=np.uint32) << 20
    return words
