"""The ways between pools of GPUs. Prefill's is the first GPU, decode's the second, or the same one where there is one.

copy-engine   cuMemcpyAsync of one run of pages a buffer: what the link does, and the baseline of all others
copy-batch    cuMemcpyBatchAsync, an entry for each page of each buffer, wherever it lies: the copy engines, scattered
nvlink        the transport alone, both ends look without a pause; +N: on N multiprocessors at most
product       the whole hand-off over it: transfer.sender, transfer.receiver, and their threads
nixl          the product over NIXL, as it is configured for GPUs
nixl-raw      NIXL by hand with CUDA IPC and its default error handling, both sides spinning; +peer: with the other
ucx           UCX by hand, NIXL's copy of it: a put for each row, both sides spinning; +list: one put for all
mooncake      Mooncake's transfer engine by hand, over its own way inside a host: one batch of copies, decode spinning
"""

from __future__ import annotations

import asyncio
import importlib
import secrets
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.ways import mooncake_raw, nixl_raw, ucx_raw
from benchmarks.ways.addresses import addresses
from benchmarks.ways.cell import AUX, Order, choose, short
from benchmarks.ways.ends import WAIT_S, DecodeEnd, HandOffFailed, PrefillEnd
from benchmarks.ways.memory import WrongByte
from benchmarks.ways.mooncake_raw import MooncakeDecode, MooncakePrefill
from benchmarks.ways.product import ProductDecode, ProductPrefill
from benchmarks.ways.told import begin_to_tell, wait_until_told
from benchmarks.ways.ucx_raw import Buffers, UcxDecode, UcxPrefill
from transfer.cuda import CudaFailed, Device
from transfer.gpu_memory import GpuMemory
from transfer.landed_ring import SIZE_BYTES, RingAddress, RingReader, RingWriter
from transfer.layout import PoolLayout
from transfer.nvlink import BLOCKS, NvlinkTransport
from transfer.plan import Pages

NVLINK_WAYS = ("nvlink", "nvlink+16", "nvlink+32", "nvlink+64")
WAYS = (
    "copy-engine",
    "copy-batch",
    *NVLINK_WAYS,
    "product",
    "nixl",
    "nixl-raw",
    "nixl-raw+peer",
    "ucx",
    "ucx+list",
    "mooncake",
)
BASELINE = "copy-engine"
MOST_ROWS = 1 << 16
"""Of one hand-off, where each costs microseconds."""
BUFFERS = 64
"""K and V of 32 layers: Llama-3.1-8B."""
CHECKED_ROWS = 64
_RAW_ENVIRONMENT = {**ucx_raw.ENVIRONMENT, "NIXL_LOG_LEVEL": "WARN"}


@dataclass(frozen=True)
class GpuCell:
    pages: int
    page_bytes: int
    """Of one buffer."""
    order: Order = "random"
    buffers: int = BUFFERS

    def __str__(self) -> str:
        order = "" if self.order == "random" else f" {self.order}"
        return f"{self.rows} rows x {short(self.page_bytes)}{order}"

    @property
    def rows(self) -> int:
        return self.pages * self.buffers

    @property
    def moved_bytes(self) -> int:
        return self.rows * self.page_bytes

    @property
    def layout(self) -> PoolLayout:
        rows = tuple(len(row) for row in AUX)
        return PoolLayout("benchmark", "uint8", 1, (self.page_bytes,) * self.buffers, rows, max(128, 2 * self.pages))

    @property
    def repetitions(self) -> int:
        return max(30, min(200, (16 << 30) // self.moved_bytes))

    def choose(self, seed: int, repetition: int) -> tuple[Pages, Pages]:
        """The source and the destination pages: the same in every process."""
        return choose(self.order, self.pages, self.layout.pages, (seed, repetition))

    def everywhere(self) -> tuple[Pages, Pages]:
        """As many pages as are timed, to warm up with."""
        return self.choose(0, 0)


def devices() -> tuple[int, int]:
    """Prefill's and decode's. Raises CudaFailed where there is none."""
    Device(0)
    try:
        Device(1)
    except CudaFailed:
        return 0, 0
    return 0, 1


def missing(way: str) -> str | None:
    """Why this way cannot be measured here; None where it can."""
    if way.startswith(("nixl", "ucx")) and nixl_raw.package() is None:
        return f"wanted one of {', '.join(nixl_raw.PACKAGES)} installed"
    return mooncake_raw.missing() if way == "mooncake" else None


def too_slow(way: str, cell: GpuCell) -> str | None:
    """Why this way is not tried in this cell; None where it is."""
    if way in (BASELINE, "nvlink", "product") or cell.rows <= MOST_ROWS:
        return None
    return "left out: a copy for each row, so seconds for each hand-off"


class GpuPrefillWays:
    """Prefill's ends. Made in the prefill process."""

    def __init__(self, device: int) -> None:
        self._device = Device(device)
        self._memory: GpuMemory | None = None

    def end(self, way: str, cell: GpuCell, lanes: int, description: Any) -> PrefillEnd:
        memory = self._pool(cell)
        match way:
            case "copy-engine" | "copy-batch":
                return _CopyPrefill(self._device, memory, description, batch=way == "copy-batch")
            case _ if way in NVLINK_WAYS:
                return _RoutePrefill(memory, description, int(way.partition("+")[2] or BLOCKS))
            case "product" | "nixl":
                return ProductPrefill("nvlink" if way == "product" else "nixl", memory.pool, lanes, "VRAM")
            case "nixl-raw" | "nixl-raw+peer":
                return _NixlPrefill(memory, description, peer=way.endswith("+peer"))
            case "ucx" | "ucx+list":
                return UcxPrefill(_buffers(memory), description, listed=way.endswith("+list"))
            case "mooncake":
                return MooncakePrefill(memory, description)
            case _:
                raise ValueError(f"way: wanted one of {', '.join(WAYS)}, found {way}")

    def _pool(self, cell: GpuCell) -> GpuMemory:
        if self._memory is None or self._memory.layout != cell.layout:
            if self._memory is not None:
                self._memory.free()
            self._memory = GpuMemory(self._device, cell.layout)
            self._memory.pattern()
        return self._memory


def decode_end(way: str, memory: GpuMemory, lanes: int) -> DecodeEnd:
    match way:
        case "copy-engine" | "copy-batch":
            return _CopyDecode(memory)
        case _ if way in NVLINK_WAYS:
            return _LandingDecode(memory)
        case "product" | "nixl":
            return ProductDecode("nvlink" if way == "product" else "nixl", memory.pool, None, lanes, "VRAM")
        case "nixl-raw" | "nixl-raw+peer":
            return _NixlDecode(memory, peer=way.endswith("+peer"))
        case "ucx" | "ucx+list":
            return UcxDecode(_buffers(memory), memory.pool)
        case "mooncake":
            return MooncakeDecode(memory)
        case _:
            raise ValueError(f"way: wanted one of {', '.join(WAYS)}, found {way}")


def _buffers(memory: GpuMemory) -> Buffers:
    return Buffers(memory.pointers, memory.layout.page_bytes, memory.layout.pages)


def compare(memory: GpuMemory, destination: Pages, source: Pages, seed: int) -> None:
    """Some rows of those that landed. Raises WrongByte."""
    chooser = np.random.default_rng(seed)
    for _ in range(CHECKED_ROWS):
        buffer, which = int(chooser.integers(len(memory.layout.page_bytes))), int(chooser.integers(len(source)))
        landed = memory.page(buffer, int(destination[which]))
        if not np.array_equal(landed, memory.expected(buffer, int(source[which]))):
            raise WrongByte(f"buffer {buffer}, page {destination[which]}: wanted the bytes of page {source[which]}")


class _CopyPrefill:
    """Tells by a write of the stream's, behind its copies, that they are done."""

    def __init__(self, device: Device, memory: GpuMemory, description: Any, *, batch: bool) -> None:
        handles, ring = description
        self._device = device
        self._memory = memory
        self._batch = batch
        self._there = [device.open(handle) for handle in handles]
        self._ring = RingWriter(ring)
        self._ring_pointer = device.map_host(self._ring.pointer, SIZE_BYTES)
        self._stream = device.stream()

    def describe(self) -> None:
        return None

    def send(self, room: int, source: Pages, destination: Pages) -> float:
        began_s = time.monotonic()
        if self._batch:
            page_bytes = self._memory.layout.page_bytes
            here = addresses(self._memory.pointers, page_bytes, source)
            there = addresses(self._there, page_bytes, destination)
            sizes = np.repeat(np.array(page_bytes, np.uint64), len(source))
            self._device.copy_many(self._stream, here, there, sizes)
        else:
            pointers = zip(self._memory.pointers, self._there, self._memory.layout.page_bytes, strict=True)
            self._device.copy(self._stream, [(here, there, len(source) * size) for here, there, size in pointers])
        offset, last = begin_to_tell(self._ring)
        self._device.write_word(self._stream, self._ring_pointer + offset, last)
        return began_s

    def close(self) -> None:
        self._device.synchronize(self._stream)
        self._device.unmap_host(self._ring.pointer)
        for pointer in self._there:
            self._device.close(pointer)


class _CopyDecode:
    def __init__(self, memory: GpuMemory) -> None:
        self.pool = memory.pool
        self._handles = memory.handles()
        self._ring = RingReader()

    def describe(self) -> tuple[list[bytes], RingAddress]:
        return self._handles, self._ring.address

    def join(self, answer: None) -> None:
        pass

    def expect(self, room: int, destination: Pages) -> None:
        pass

    def wait(self, room: int) -> float:
        return wait_until_told(self._ring)

    def close(self) -> None:
        self._ring.close()


class _Alone:
    """What a transport may ask for, where there is no hand-off connection."""

    async def dial(self, token: bytes) -> Any:
        raise AssertionError("nvlink wants no more connections")

    def broken(self, reason: str) -> None:
        raise HandOffFailed(reason)

    def take(self, token: bytes) -> list[Any]:
        return []


class _RoutePrefill:
    def __init__(self, memory: GpuMemory, description: bytes, blocks: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._route = self._loop.run_until_complete(
            NvlinkTransport(memory.pool, blocks=blocks).connect(description, memory.layout, _Alone())
        )

    def describe(self) -> None:
        return None

    def send(self, room: int, source: Pages, destination: Pages) -> float:
        async def write() -> float:
            # In the loop, where the product is too: to enter it takes longer than a small write.
            began_s = time.monotonic()
            await self._route.write(room, 0, source, destination)
            return began_s

        return self._loop.run_until_complete(write())

    def close(self) -> None:
        self._loop.run_until_complete(self._route.disconnect())
        self._loop.close()


class _LandingDecode:
    def __init__(self, memory: GpuMemory) -> None:
        self.pool = memory.pool
        self._landing = asyncio.run(NvlinkTransport(memory.pool).land(_Alone()))

    def describe(self) -> bytes:
        return self._landing.describe()

    def join(self, answer: None) -> None:
        pass

    def expect(self, room: int, destination: Pages) -> None:
        self._landing.expect(room, destination)

    def wait(self, room: int) -> float:
        deadline_s = time.monotonic() + WAIT_S
        while not self._landing.in_place(room):
            if time.monotonic() > deadline_s:
                raise HandOffFailed(f"not over after {WAIT_S:g} s")
        return time.monotonic()

    def close(self) -> None:
        asyncio.run(self._landing.disconnect())


def _agent(memory: GpuMemory, *, peer: bool) -> tuple[Any, bytes]:
    """A NIXL agent without a thread of its own. peer: with the error handling that notices a dead peer."""
    name = nixl_raw.package()
    assert name is not None, "only measured where it is installed"
    with nixl_raw.environment(_RAW_ENVIRONMENT):
        api = importlib.import_module(f"{name}._api")
        agent = api.nixl_agent(secrets.token_hex(8), api.nixl_agent_config(enable_prog_thread=False, backends=[]))
        agent.create_backend("UCX", {"ucx_error_handling_mode": "peer" if peer else "none"})
    device = memory.device_number
    sizes = [memory.layout.pages * size for size in memory.layout.page_bytes]
    agent.register_memory(
        [(pointer, size, device, "") for pointer, size in zip(memory.pointers, sizes, strict=True)], "VRAM"
    )
    return agent, agent.get_agent_metadata()


def _rows(pointers: list[int], layout: PoolLayout, device: int) -> npt.NDArray[np.uint64]:
    """(address, bytes, device) of every page of every buffer, shape (buffers * pages, 3)."""
    starts = addresses(pointers, layout.page_bytes, np.arange(layout.pages, dtype=np.int32))
    rows = np.empty((starts.size, 3), np.uint64)
    rows[:, 0], rows[:, 1], rows[:, 2] = starts.ravel(), np.repeat(layout.page_bytes, layout.pages), device
    return rows


class _NixlPrefill:
    def __init__(self, memory: GpuMemory, description: Any, *, peer: bool) -> None:
        metadata, pointers, device = description
        self._layout = memory.layout
        self._agent, self._metadata = _agent(memory, peer=peer)
        name = self._agent.add_remote_agent(metadata)
        here = _rows(memory.pointers, memory.layout, memory.device_number)
        self._here = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", here, "VRAM")
        self._there = self._agent.prep_xfer_dlist(name, _rows(pointers, memory.layout, device), "VRAM")

    def describe(self) -> bytes:
        return self._metadata

    def send(self, room: int, source: Pages, destination: Pages) -> float:
        began_s = time.monotonic()
        starts = np.arange(len(self._layout.page_bytes), dtype=np.int32)[:, None] * np.int32(self._layout.pages)
        here, there = ((starts + pages[None, :]).ravel() for pages in (source, destination))
        transfer = self._agent.make_prepped_xfer("WRITE", self._here, here, self._there, there, b"done")
        nixl_raw.carry_out(self._agent, transfer)
        return began_s

    def close(self) -> None:
        self._here.release()
        self._there.release()
        del self._agent


class _NixlDecode:
    def __init__(self, memory: GpuMemory, *, peer: bool) -> None:
        self.pool = memory.pool
        self._memory = memory
        self._agent, self._metadata = _agent(memory, peer=peer)

    def describe(self) -> tuple[bytes, list[int], int]:
        return self._metadata, self._memory.pointers, self._memory.device_number

    def join(self, answer: bytes) -> None:
        self._agent.add_remote_agent(answer)

    def expect(self, room: int, destination: Pages) -> None:
        pass

    def wait(self, room: int) -> float:
        return nixl_raw.wait_for_message(self._agent)

    def close(self) -> None:
        del self._agent
