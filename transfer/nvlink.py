"""Pages between two GPUs of one host: prefill's GPU writes into decode's pool, which it has mapped. One kernel a write.

    write         prefill   one launch for all buffers; page indices travel with it as arguments, nothing waits for it
    write_ahead   prefill   in a stream of its own, which holds it until they have been computed: one launch for all
                            layers, or one for those before the last and one for that
    confirm       prefill   a launch that copies nothing, behind those: it says that they are there
    landed        decode    reads the records that the kernel leaves in host memory once its pages are in place
    settled       prefill   both streams have come by, so that it can say that it stopped

CUDA maps the other process's memory (IPC handles of whole allocations). A mapping cannot be taken from a process, so a
lease (transfer/lease.py) is held as long as a kernel may be under way: decode withdraws it from a writer that is lost.
A process that dies takes its kernels with it before its locks are let go of.

Both processes have to see both GPUs: choose one by SGLang's `base-gpu-id`, not by CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import secrets
import struct
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from transfer.computed import Computed
from transfer.cuda import CudaFailed, Device, Launch
from transfer.landed_ring import SIZE_BYTES, NoRing, RingAddress, RingReader, RingWriter, record
from transfer.layout import PoolLayout
from transfer.lease import Lease, LeaseAddress, Leave, Withdrawn
from transfer.plan import Pages, check_lengths, check_range
from transfer.pool import Pool
from transfer.transport import Ahead, Lanes, RouteLost, Unreachable, Wire
from transfer.undecodable import UNDECODABLE

log = logging.getLogger(__name__)

MOST_PAGES = (64, 1024, 4000)
"""Of one launch; a kernel for each in copy_pages.cu. The last is what fits into a launch's arguments."""
THREADS = 512
"""Of a block: a quarter of what a multiprocessor runs at a time."""
WARPS = THREADS // 32
PIECE_BYTES = 2048
"""What a warp copies at a time."""
COMPILED_WITH = (f"--define-macro=PIECE_BYTES={PIECE_BYTES}",)
VECTOR_BYTES = 16
COUNTERS_BYTES = 256
"""For two counters, each on a line of its own."""
BLOCKS = 128
"""Multiprocessors that a write runs on, beside what else they do. As many threads on half of them take longer."""
WATCH_S = 1e-3
"""Between two looks at whether all that was begun is done."""
SPIN_S = 0.2e-3
"""Looked for without a pause. Each look takes the interpreter from a scheduler in the same process."""
DOZE_S, DOZES_S = 5e-5, 20e-3
"""Then slept for so long between two looks, up to so long: asyncio knows no sleep below a millisecond."""
_PROCESS = secrets.token_bytes(16)
"""Of those that were forked from one process it is the same, but not the process's number."""


class _Buffer(msgspec.Struct, frozen=True, array_like=True):
    """Where a buffer of the landing's pool begins."""

    handle: int
    """Which of the handles."""
    offset: int
    pointer: int
    """In the landing's own process."""


class _Address(msgspec.Struct, frozen=True, array_like=True):
    process: bytes
    number: int
    """Of the process."""
    handles: tuple[bytes, ...]
    sizes_bytes: tuple[int, ...]
    """Of each handle's allocation."""
    buffers: tuple[_Buffer, ...]
    ring: RingAddress
    lease: LeaseAddress


Layers = tuple[tuple[int, ...], ...]
"""Which buffers of a pool are whose, layer by layer as they are computed. Those of none are there with the last one."""


class NvlinkTransport:
    """blocks  multiprocessors that a write runs on at most
    layers  given where pages shall leave while they are still computed

    The pool lies on one GPU. Raises Unreachable where it lies elsewhere, or its memory cannot be shared.
    """

    name = "nvlink"

    def __init__(self, pool: Pool, *, blocks: int = BLOCKS, layers: Layers | None = None) -> None:
        self._pool = pool
        self._layers = layers
        self._pointers = [buffer.ctypes.data for buffer in pool.buffers]
        uneven = [size for size in (*pool.layout.page_bytes, *self._pointers) if size % VECTOR_BYTES]
        if uneven:
            raise Unreachable(f"nvlink: wanted pages in multiples of {VECTOR_BYTES} bytes, found {uneven[0]}")
        try:
            self._device = Device.of(self._pointers[0])
            source = (files("transfer") / "copy_pages.cu").read_text()
            self._kernels = [self._device.kernel(source, f"copy_pages_{most}", COMPILED_WITH) for most in MOST_PAGES]
            allocations = [self._device.allocation_of(pointer) for pointer in self._pointers]
        except CudaFailed as error:
            raise Unreachable(f"nvlink: {error}") from error
        self._allocations = list(dict.fromkeys(allocations))
        self._buffers = tuple(
            _Buffer(self._allocations.index(one), pointer - one.base, pointer)
            for one, pointer in zip(allocations, self._pointers, strict=True)
        )
        self._blocks = min(blocks, self._device.multiprocessors)

    async def land(self, wire: Wire) -> NvlinkLanding:
        self._device.use()
        try:
            handles = tuple(self._device.share(one) for one in self._allocations)
        except CudaFailed as error:
            raise Unreachable(
                f"nvlink: {error}: memory of cudaMalloc is wanted, not torch's expandable segments"
            ) from error
        return NvlinkLanding(handles, tuple(one.size_bytes for one in self._allocations), self._buffers)

    async def connect(self, description: bytes, layout: PoolLayout, lanes: Lanes) -> NvlinkRoute:
        """As the contract says. CUDA takes about ten milliseconds for each allocation: in a thread of its own."""
        self._device.use()  # This thread's too: it launches.
        work = asyncio.ensure_future(asyncio.to_thread(self._connect, description, layout))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            work.add_done_callback(_give_up)
            raise

    def _connect(self, description: bytes, layout: PoolLayout) -> NvlinkRoute:
        """Raises Unreachable."""
        self._device.use()
        with ExitStack() as undo:
            try:
                address = msgspec.msgpack.decode(description, type=_Address)
                _check(address, layout, self._pool.layout)
                ring = RingWriter(address.ring)
                leave = Leave(address.lease)
                undo.callback(leave.close)
                mapped, pointers = self._map(address, undo)
                table = _Table.of(self._pool.layout, self._pointers, pointers, self._layers)
                job = _Copy(self._device, self._kernels, self._blocks, table, ring, undo)
            except (*UNDECODABLE, ValueError, NoRing, Withdrawn, CudaFailed) as error:
                raise Unreachable(f"nvlink: {error}") from error
            undo.pop_all()
        by_layer = self._layers is not None
        return NvlinkRoute(self._device, self._pool.layout, layout, mapped, job, leave, by_layer=by_layer)

    def _map(self, address: _Address, undo: ExitStack) -> tuple[list[int], list[int]]:
        """The landing's allocations and its buffers, where they lie in this process. Raises CudaFailed."""
        if (address.process, address.number) == (_PROCESS, os.getpid()):
            # CUDA opens no handle of the process itself; tests have both ends in one.
            return [], [one.pointer for one in address.buffers]
        mapped = []
        for handle in address.handles:
            mapped.append(self._device.open(handle))
            undo.callback(self._device.close, mapped[-1])
        return mapped, [mapped[one.handle] + one.offset for one in address.buffers]


class NvlinkLanding:
    """Decode's end."""

    def __init__(self, handles: tuple[bytes, ...], sizes_bytes: tuple[int, ...], buffers: tuple[_Buffer, ...]) -> None:
        self._ring = RingReader()
        self._lease: Lease | None = Lease()
        self._address = _Address(
            _PROCESS, os.getpid(), handles, sizes_bytes, buffers, self._ring.address, self._lease.address
        )
        self._expected: dict[int, int] = {}
        """Pages of each tag."""
        self._landed: defaultdict[int, int] = defaultdict(int)

    def describe(self) -> bytes:
        return msgspec.msgpack.encode(self._address)

    def expect(self, tag: int, pages: Pages) -> None:
        if self._lease is not None:
            self._expected[tag] = len(pages)

    def coming(self, tag: int) -> None:
        """Makes room for more records."""
        self._look()

    def in_place(self, tag: int) -> bool:
        if self._lease is None:
            return False
        self._look()
        if self._landed[tag] < self._expected.get(tag, 0):
            return False
        self._forget(tag)
        return True

    async def landed(self, tag: int) -> None:
        since_s = time.monotonic()
        while not self.in_place(tag):
            if self._lease is None:
                raise RouteLost("nvlink: disconnected")
            await _pause(since_s)

    async def fence(self, tag: int) -> None:
        """Returns at once: a writer that says that it stopped has waited for its GPU."""
        self._look()
        self._forget(tag)

    async def disconnect(self) -> None:
        lease, self._lease = self._lease, None
        if lease is None:
            return
        await lease.take_back()
        self._ring.close()
        self._expected.clear()
        self._landed.clear()

    def _look(self) -> None:
        for tag, pages in self._ring.take():
            if tag in self._expected:
                self._landed[tag] += pages

    def _forget(self, tag: int) -> None:
        self._expected.pop(tag, None)
        self._landed.pop(tag, None)


class NvlinkRoute:
    """Prefill's end."""

    landing_is_polled = False
    slice_bytes = 1 << 30

    def __init__(
        self,
        device: Device,
        mine: PoolLayout,
        theirs: PoolLayout,
        mapped: list[int],
        job: _Copy,
        leave: Leave,
        *,
        by_layer: bool,
    ) -> None:
        self._device = device
        self._mine = mine
        self._theirs = theirs
        self._mapped = mapped
        self._job = job
        self._leave = leave
        self._by_layer = by_layer
        self._lost: str | None = None
        self._watching: asyncio.Task[None] | None = None
        """Holds the lease while the GPU writes."""
        self._ended = False

    @property
    def ahead(self) -> Ahead | None:
        return self if self._by_layer else None

    async def write(self, tag: int, first: int, source: Pages, destination: Pages) -> None:
        """Returns once the GPU has been told."""
        await self._write(self._job.now, tag, source, destination)

    async def write_again(self, tag: int, first: int, source: Pages, destination: Pages) -> None:
        await self._write(self._job.ahead, tag, source, destination)

    async def _write(self, lane: _Lane, tag: int, source: Pages, destination: Pages) -> None:
        self._check_pages(source, destination)
        for start in range(0, len(source), MOST_PAGES[-1]):
            end = start + MOST_PAGES[-1]
            if self._job.ring.full:
                await self._room()
            self._tell(lane, tag, source[start:end], destination[start:end], len(source[start:end]))

    async def write_ahead(self, source: Pages, destination: Pages, fresh: int, computed: Computed) -> None:
        self._check_pages(source, destination)
        self._check()
        self._hold()
        early, rows = len(source) - fresh, self._job.table.layers(computed.layers)
        try:
            self._copy_after(computed.before, source[:early], destination[:early], self._job.all)
            self._copy_after(computed.nearly, source[early:], destination[early:], self._job.all[:rows])
            self._copy_after(computed.done, source[early:], destination[early:], self._job.all[rows:])
        except CudaFailed as error:
            raise self._failed(error) from error
        finally:
            self._watch_soon()

    def _copy_after(self, event: Any, source: Pages, destination: Pages, rows: range) -> None:
        if not len(source) or not rows:
            return
        self._device.wait(self._job.ahead.stream, event)
        for start in range(0, len(source), MOST_PAGES[-1]):
            end = start + MOST_PAGES[-1]
            self._job.copy(self._job.ahead, source[start:end], destination[start:end], rows)

    async def confirm(self, tag: int, pages: int) -> None:
        if self._job.ring.full:
            await self._room()
        nothing = np.empty(0, np.int32)
        self._tell(self._job.ahead, tag, nothing, nothing, pages)

    async def _room(self) -> None:
        """Until there is a place for a record, or no leave to write any more."""
        since_s = time.monotonic()
        while self._job.ring.full:
            self._check()
            if not self._leave.given:
                return
            await _pause(since_s)

    def _tell(self, lane: _Lane, tag: int, source: Pages, destination: Pages, pages: int) -> None:
        """One launch, with a record of so many pages."""
        self._check()
        self._hold()
        try:
            self._job.copy_and_tell(lane, tag, source, destination, pages)
        except CudaFailed as error:
            raise self._failed(error) from error
        finally:
            self._watch_soon()

    async def settled(self) -> None:
        self._check()
        events = []
        try:
            for lane in self._job.lanes:
                events.append(self._device.event())
                self._device.record(events[-1], lane.stream)
            while not all(self._device.reached(event) for event in events):
                await asyncio.sleep(WATCH_S)
                self._check()
        except CudaFailed as error:
            raise self._failed(error) from error
        finally:
            with suppress(CudaFailed):  # Told above.
                for event in events:
                    self._device.destroy_event(event)

    async def disconnect(self) -> None:
        self._lost = self._lost or "nvlink: disconnected"
        if self._watching is not None:
            # Shielded: whoever is cancelled while waiting must not cancel the holding.
            await asyncio.shield(self._watching)
        if self._ended:
            return
        self._ended = True
        # It may wait for what the GPU computes.
        await asyncio.to_thread(self.release)

    def release(self) -> None:
        """Gives back what a route that writes nothing has."""
        self._device.use()
        try:
            self._job.close()
            for one in self._mapped:
                self._device.close(one)
        except CudaFailed as error:
            # The GPU is of no use to this process any more: SGLang finds that too, and ends.
            log.error("nvlink: %s", error)
        self._leave.close()

    def _check_pages(self, source: Pages, destination: Pages) -> None:
        check_range(source, self._mine.pages)
        check_range(destination, self._theirs.pages)
        check_lengths(source, destination)

    def _failed(self, error: CudaFailed) -> RouteLost:
        self._lost = f"nvlink: {error}"
        return RouteLost(self._lost)

    def _check(self) -> None:
        if self._lost is not None:
            raise RouteLost(self._lost)

    def _hold(self) -> None:
        """Raises RouteLost where decode has withdrawn its leave."""
        if self._watching is not None and not self._watching.done():
            if self._leave.given:
                return
            # What is under way keeps the lock until it is done.
            self._lost = "nvlink: decode has withdrawn the leave to write"
            self._check()
        try:
            self._leave.begin()
        except Withdrawn as error:
            self._lost = f"nvlink: {error}"
            raise RouteLost(self._lost) from error

    def _watch_soon(self) -> None:
        """Behind a launch, also one that failed: the lease is held as long as anything may be under way."""
        if self._watching is None or self._watching.done():
            self._watching = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        """Without haste: only the route's end waits for it, and each look takes the interpreter from the scheduler."""
        try:
            while not self._job.idle:
                await asyncio.sleep(WATCH_S)
        except CudaFailed as error:
            log.error("nvlink: %s", error)
            self._lost = f"nvlink: {error}"
        # Not where this task is cut off: its process is about to end then, and decode has to wait for that.
        self._leave.end()


@dataclass(frozen=True)
class _Table:
    """Where each buffer begins here and there, those of a layer beside each other: a launch copies a range of them."""

    rows: npt.NDArray[np.uint64]
    """Shape (buffers, 3): its address here, its address there, bytes of a page."""
    ends: tuple[int, ...]
    """Behind each layer's last row; the last layer's are all that are left."""

    @classmethod
    def of(cls, layout: PoolLayout, here: list[int], there: list[int], layers: Layers | None) -> _Table:
        everything = range(len(here))
        by_layer: Sequence[Sequence[int]] = [everything] if layers is None else layers
        order = [buffer for layer in by_layer for buffer in layer]
        ends = [sum(len(layer) for layer in by_layer[: number + 1]) for number in range(len(by_layer))]
        order += sorted(set(everything) - set(order))
        ends[-1] = len(order)
        rows = [(here[buffer], there[buffer], layout.page_bytes[buffer]) for buffer in order]
        return cls(np.array(rows, np.uint64), tuple(ends))

    def layers(self, count: int) -> int:
        """How many rows the first layers have."""
        return self.ends[count - 1] if count else 0


@dataclass(frozen=True)
class _Lane:
    """A stream, whose launches come one after the other."""

    stream: Any
    blocks_done: int
    """Where they count, as copy_pages.cu has it."""
    launch: Launch


_FORMAT = "QIIQQQQ"
_ARGUMENTS = struct.Struct("=" + _FORMAT)
"""As copy_pages.cu has them, without the pages: the first buffer, how many, pieces of each, where blocks count; then
where the record is, and its two words."""
_OFFSETS = tuple(struct.calcsize("=" + _FORMAT[:place]) for place in range(len(_FORMAT)))
_NO_RECORD = (0, 0, 0)


class _Copy:
    """The kernel of one route, its streams and its arguments."""

    def __init__(
        self, device: Device, kernels: list[int], blocks: int, table: _Table, ring: RingWriter, undo: ExitStack
    ) -> None:
        """undo: takes back what was made, where the rest comes to nothing. Raises CudaFailed."""
        self.ring = ring
        self.table = table
        self._device = device
        self._kernels = kernels
        self._blocks = blocks
        self._ring_pointer = device.map_host(ring.pointer, SIZE_BYTES)
        undo.callback(device.unmap_host, ring.pointer)
        self._memory = device.allocate(COUNTERS_BYTES + table.rows.nbytes)
        undo.callback(device.free, self._memory)
        device.upload(self._memory + COUNTERS_BYTES, table.rows)
        # Both went through the default stream, for which the others do not wait.
        device.synchronize(0)
        streams = []
        for _ in range(2):
            streams.append(device.stream())
            undo.callback(device.destroy_stream, streams[-1])
        self.lanes = self.now, self.ahead = (
            _Lane(streams[0], self._memory, Launch(streams[0], THREADS)),
            _Lane(streams[1], self._memory + COUNTERS_BYTES // 2, Launch(streams[1], THREADS)),
        )
        self.all = range(len(table.rows))
        self._row_bytes = table.rows.strides[0]
        self._pieces = -(-int(table.rows[:, 2].max()) // PIECE_BYTES)
        self._kept = ctypes.create_string_buffer(_ARGUMENTS.size)
        kept = [ctypes.addressof(self._kept) + offset for offset in _OFFSETS]
        pages = [np.zeros(1 + 2 * most, np.int32) for most in MOST_PAGES]
        self._arguments = [np.array([*kept, one.ctypes.data], np.uintp) for one in pages]
        # Asked once: numpy takes two microseconds to say where an array lies, and long to fill one that is short.
        self._arguments_at = [arguments.ctypes.data for arguments in self._arguments]
        self._pages = [one.data for one in pages]

    @property
    def idle(self) -> bool:
        """Raises CudaFailed."""
        return all(self._device.idle(lane.stream) for lane in self.lanes)

    def copy_and_tell(self, lane: _Lane, tag: int, source: Pages, destination: Pages, pages: int) -> None:
        """At most MOST_PAGES[-1] pages; a record of `pages`. Only where the ring is not full. Raises CudaFailed."""
        sequence, offset = self.ring.next()
        self._launch(lane, source, destination, self.all, (self._ring_pointer + offset, *record(sequence, tag, pages)))

    def copy(self, lane: _Lane, source: Pages, destination: Pages, buffers: range) -> None:
        """At most MOST_PAGES[-1] pages of these rows of the table, and nobody is told. Raises CudaFailed."""
        self._launch(lane, source, destination, buffers, _NO_RECORD)

    def _launch(
        self, lane: _Lane, source: Pages, destination: Pages, buffers: range, told: tuple[int, int, int]
    ) -> None:
        """told: as the last of _ARGUMENTS"""
        count = len(source)
        size = bisect_left(MOST_PAGES, count)
        pages, most = self._pages[size], MOST_PAGES[size]
        pages[0] = count
        pages[1 : 1 + count] = source.data
        pages[1 + most : 1 + most + count] = destination.data
        start = self._memory + COUNTERS_BYTES + buffers.start * self._row_bytes
        _ARGUMENTS.pack_into(self._kept, 0, start, len(buffers), self._pieces, lane.blocks_done, *told)
        warps = count * len(buffers) * self._pieces
        lane.launch.blocks = max(1, min(self._blocks, -(-warps // WARPS)))
        self._device.launch(self._kernels[size], lane.launch, self._arguments_at[size])

    def close(self) -> None:
        """Once its streams are idle."""
        for lane in self.lanes:
            self._device.destroy_stream(lane.stream)
        self._device.free(self._memory)
        self._device.unmap_host(self.ring.pointer)


def _give_up(connecting: asyncio.Future[NvlinkRoute]) -> None:
    """Nobody waits for this route any more."""
    if connecting.exception() is None:
        connecting.result().release()


async def _pause(since_s: float) -> None:
    """Between two looks at something that has been waited for since then."""
    waited_s = time.monotonic() - since_s
    if SPIN_S < waited_s < DOZES_S:
        time.sleep(DOZE_S)
    await asyncio.sleep(0 if waited_s < DOZES_S else 1e-3)


def _check(address: _Address, layout: PoolLayout, mine: PoolLayout) -> None:
    """Raises ValueError unless these buffers hold a pool of this layout, which fits this side's."""
    for field, wanted, found in (
        ("page_bytes", mine.page_bytes, layout.page_bytes),
        ("buffers", len(layout.page_bytes), len(address.buffers)),
        ("handles", len(address.sizes_bytes), len(address.handles)),
    ):
        if wanted != found:
            raise ValueError(f"{field}: wanted {wanted}, found {found}")
    for one, page_bytes in zip(address.buffers, layout.page_bytes, strict=True):
        if not 0 <= one.handle < len(address.handles):
            raise ValueError(f"buffers: wanted one of {len(address.handles)} handles, found {one.handle}")
        end, size_bytes = one.offset + layout.pages * page_bytes, address.sizes_bytes[one.handle]
        if not 0 <= one.offset < end <= size_bytes:
            raise ValueError(f"buffers: wanted them within {size_bytes} bytes, found one that ends at {end}")
