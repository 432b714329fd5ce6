"""The transport nvlink on real GPUs: what every transport keeps, and processes that die while a kernel runs.

With one GPU both processes use it: memory of another process is mapped the same way, but no link is crossed.
"""

from __future__ import annotations

import asyncio
import base64
import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transfer.computed import Computed
from transfer.cuda import CudaFailed, Device
from transfer.gpu_memory import GpuMemory
from transfer.layout import PoolLayout
from transfer.nvlink import Layers, NvlinkLanding, NvlinkRoute, NvlinkTransport
from transfer.plan import Pages
from transfer.transport import RouteLost, Unreachable

pytestmark = pytest.mark.gpu

CANARY = 0xEE
WITHIN_S = 60


@pytest.fixture(scope="module")
def device() -> Device:
    return Device(0)


@pytest.fixture(scope="module")
def other_device() -> int:
    """The peer's, another one where there is one."""
    try:
        Device(1)
    except CudaFailed:
        return 0
    finally:
        Device(0)
    return 1


def test_memory_is_found_on_the_gpu_on_which_it_lies(device: Device, other_device: int) -> None:
    for number in {0, other_device}:
        owner = Device(number)
        pointer = owner.allocate(4096)
        device.use()
        found = Device.of(pointer)
        assert (found.number, found.allocation_of(pointer).base) == (number, pointer)
        owner.free(pointer)
    device.use()


def layout(page_bytes: tuple[int, ...], pages: int) -> PoolLayout:
    return PoolLayout("m", "bfloat16", 16, page_bytes, (), pages)


def some(count: int, of: int, seed: int) -> Pages:
    return np.random.default_rng(seed).permutation(of)[:count].astype(np.int32)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, WITHIN_S))


class NoWire:
    async def dial(self, token: bytes) -> Any:
        raise AssertionError("nvlink wants no more connections")

    def broken(self, reason: str) -> None:
        raise AssertionError(reason)

    def take(self, token: bytes) -> list[Any]:
        return []


class Ends:
    """Both ends in this process: CUDA maps nothing then, all the rest is as it is."""

    def __init__(
        self, device: Device, source: PoolLayout, destination: PoolLayout, layers: Layers | None = None
    ) -> None:
        self.source, self.destination = GpuMemory(device, source), GpuMemory(device, destination)
        self.source.pattern()
        self.destination.fill(CANARY)
        self.writer = NvlinkTransport(self.source.pool, layers=layers)
        self.reader = NvlinkTransport(self.destination.pool)

    async def join(self) -> tuple[NvlinkLanding, NvlinkRoute]:
        landing = await self.reader.land(NoWire())
        return landing, await self.writer.connect(landing.describe(), self.destination.layout, NoWire())

    def check(self, source: Pages, destination: Pages) -> None:
        """These pages are there, and nothing else is."""
        for mine, theirs in zip(self.source.read(), self.destination.read(), strict=True):
            assert np.array_equal(mine[source], theirs[destination])
            rest = np.ones(len(theirs), np.bool_)
            rest[destination] = False
            assert (theirs[rest] == CANARY).all()


@asynccontextmanager
async def joined(
    device: Device, page_bytes: tuple[int, ...], pages: int, more: int = 5, layers: Layers | None = None
) -> AsyncIterator[tuple[Ends, NvlinkLanding, NvlinkRoute]]:
    ends = Ends(device, layout(page_bytes, pages), layout(page_bytes, pages + more), layers)
    landing, route = await ends.join()
    try:
        yield ends, landing, route
    finally:
        await route.disconnect()
        await landing.disconnect()
        ends.source.free()
        ends.destination.free()


@pytest.mark.parametrize(
    ("page_bytes", "count"),
    [
        ((2 << 10,), 1),
        ((2 << 10,) * 64, 8192),
        ((16 << 10,), 64),
        ((128 << 10,) * 64, 8),
        ((128 << 10,), 65),
        ((2 << 20,), 9),
        ((12288,) * 60, 16),
        ((4096, 2048, 8192), 100),
        ((9232,), 1025),
        ((16,), 4001),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else f"{len(value)}x{value[0]}B",
)
@pytest.mark.parametrize("order", ["fragmented", "contiguous"])
def test_every_page_lands_where_it_belongs_and_nowhere_else(
    device: Device, page_bytes: tuple[int, ...], count: int, order: str
) -> None:
    async def work() -> None:
        async with joined(device, page_bytes, count + 3) as (ends, landing, route):
            if order == "fragmented":
                source, destination = some(count, count + 3, 1), some(count, count + 8, 2)
            else:
                source, destination = (np.arange(start, start + count, dtype=np.int32) for start in (2, 7))
            landing.expect(1, destination)
            await route.write(1, 0, source, destination)
            await landing.landed(1)
            ends.check(source, destination)

    run(work())


def test_chunks_of_one_tag_and_tags_of_one_peer_do_not_mix(device: Device) -> None:
    async def work() -> None:
        async with joined(device, (4096, 2048), 200) as (ends, landing, route):
            source, destination = some(160, 200, 1), some(160, 205, 2)
            for tag in range(8):
                landing.expect(tag, destination[tag * 20 : tag * 20 + 20])
            for first in (0, 13):
                for tag in range(8):
                    start, end = tag * 20 + first, tag * 20 + (13 if first == 0 else 20)
                    await route.write(tag, first, source[start:end], destination[start:end])
            async with asyncio.TaskGroup() as group:
                for tag in range(8):
                    group.create_task(landing.landed(tag))
            ends.check(source, destination)

    run(work())


def test_more_records_than_the_ring_has(device: Device) -> None:
    async def work() -> None:
        async with joined(device, (4096,), 64) as (ends, landing, route):
            every = np.arange(64, dtype=np.int32)
            for tag in range(80):
                landing.expect(tag, every)

            async def write() -> None:
                for tag in range(80):
                    for page in range(64):
                        await route.write(tag, page, every[page : page + 1], every[page : page + 1])

            writing = asyncio.create_task(write())
            for tag in range(80):
                await landing.landed(tag)
            await writing
            await route.settled()
            ends.check(every, every)

    run(work())


def test_no_pages_are_a_hand_off_too(device: Device) -> None:
    async def work() -> None:
        async with joined(device, (4096,), 8) as (_, landing, route):
            nothing = np.empty(0, np.int32)
            landing.expect(1, nothing)
            await route.write(1, 0, nothing, nothing)
            await landing.landed(1)

    run(work())


def test_nothing_is_written_once_decode_has_withdrawn_its_leave(device: Device) -> None:
    async def work() -> None:
        async with joined(device, (1 << 20,), 64) as (ends, landing, route):
            every = np.arange(64, dtype=np.int32)
            landing.expect(1, every)

            async def write() -> None:
                while True:
                    await route.write(1, 0, every, every)
                    await asyncio.sleep(0)

            writing = asyncio.create_task(write())
            await asyncio.sleep(0.02)
            await landing.disconnect()
            ends.destination.fill(CANARY)
            with pytest.raises(RouteLost, match="withdrawn"):
                await writing
            ends.check(every[:0], every[:0])

    run(work())


@pytest.mark.parametrize("description", [b"", b"garbage", b"\x92\x01\x02", bytes(4096), b"\x91" * 60_000])
def test_a_description_that_leads_nowhere_is_unreachable(device: Device, description: bytes) -> None:
    async def work() -> None:
        async with joined(device, (4096,), 8) as (ends, _, _route):
            with pytest.raises(Unreachable, match=r"^nvlink: "):
                await ends.writer.connect(description, ends.destination.layout, NoWire())

    run(work())


def test_a_description_of_another_pool_is_unreachable(device: Device) -> None:
    async def work() -> None:
        async with joined(device, (4096, 2048), 8) as (ends, landing, _):
            for other in (layout((4096, 2048), 1_000_000), layout((4096,), 13)):
                with pytest.raises(Unreachable, match=r"^nvlink: "):
                    await ends.writer.connect(landing.describe(), other, NoWire())

    run(work())


def test_memory_that_is_no_gpus_is_refused() -> None:
    from transfer.pool import Pool

    with pytest.raises(Unreachable, match=r"^nvlink: cuPointerGetAttribute"):
        NvlinkTransport(Pool.zeros(layout((4096,), 8)))


LAYERED = ((128 << 10,) * 8, ((0, 4), (1, 5), (2, 6)))
"""K of three layers and of a draft's, then V of the same: the draft's are no layer's."""


class Pass:
    """A forward pass, all of it in its stream, that gets as far as it is told to.

    Once it is there no memory is allocated and no kernel loaded: CUDA may wait for all streams then.
    """

    def __init__(self, device: Device, layers: int = 2) -> None:
        self._device = device
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._word = np.frombuffer(self._memory, np.uint32)[:1]
        pointer = device.map_host(int(self._word.ctypes.data), mmap.PAGESIZE)
        self._stream = device.stream()
        before, nearly, done = (device.event() for _ in range(3))
        for number, event in enumerate((before, nearly, done), start=1):
            device.wait_for_word(self._stream, pointer, number)
            device.record(event, self._stream)
        self.computed = Computed(before, done, nearly, layers)

    def begins(self) -> None:
        self._word[0] = 1

    def is_nearly_done(self) -> None:
        self._word[0] = 2

    def is_done(self) -> None:
        self._word[0] = 3

    def close(self) -> None:
        self._device.synchronize(self._stream)
        self._device.unmap_host(int(self._word.ctypes.data))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(1e-3)


def test_what_is_computed_leaves_and_nothing_before(device: Device) -> None:
    async def work() -> None:
        page_bytes, layers = LAYERED
        async with joined(device, page_bytes, 200, layers=layers) as (ends, landing, route):
            computing = Pass(device)
            source, destination = some(150, 200, 1), some(150, 205, 2)
            landing.expect(5, destination)
            assert route.ahead is not None
            await route.ahead.write_ahead(source, destination, 110, computing.computed)
            settling = asyncio.create_task(route.settled())

            def there(of: slice) -> list[int]:
                return [number for number in range(8) if same(ends, (number,), source[of], destination[of])]

            early, fresh = slice(40), slice(40, 150)
            await asyncio.sleep(0.05)
            assert (there(early), there(fresh)) == ([], [])
            computing.begins()
            await until(lambda: there(early) == list(range(8)))
            assert there(fresh) == []
            computing.is_nearly_done()
            await until(lambda: there(fresh) == [0, 1, 4, 5])
            await asyncio.sleep(0.02)
            assert there(fresh) == [0, 1, 4, 5]
            assert not settling.done()
            computing.is_done()
            await settling
            assert not landing.in_place(5), "nobody was told"
            await route.ahead.confirm(5, 150)
            await landing.landed(5)
            ends.check(source, destination)
            computing.close()

    run(work())


def test_a_page_that_is_written_again_after_it_went_ahead_is_the_later_one(device: Device) -> None:
    async def work() -> None:
        page_bytes, layers = LAYERED
        async with joined(device, page_bytes, 200, layers=layers) as (ends, landing, route):
            computing = Pass(device)
            guessed, source, destination = some(150, 200, 1), some(150, 200, 3), some(150, 205, 2)
            landing.expect(5, destination)
            assert route.ahead is not None
            await route.ahead.write_ahead(guessed, destination, len(guessed), computing.computed)
            await route.ahead.write_again(5, 0, source[:70], destination[:70])
            await route.ahead.write_again(5, 70, source[70:], destination[70:])
            await asyncio.sleep(0.05)
            assert not landing.in_place(5)
            computing.is_done()
            await landing.landed(5)
            ends.check(source, destination)
            computing.close()

    run(work())


def test_pages_that_are_computed_do_not_wait_for_those_that_go_ahead(device: Device) -> None:
    async def work() -> None:
        page_bytes, layers = LAYERED
        async with joined(device, page_bytes, 200, layers=layers) as (ends, landing, route):
            computing = Pass(device)
            pages, places = some(150, 200, 1), some(150, 205, 2)
            landing.expect(5, places[:70])
            landing.expect(6, places[70:])
            assert route.ahead is not None
            await route.ahead.write_ahead(pages[:70], places[:70], 70, computing.computed)
            await route.write(6, 0, pages[70:], places[70:])
            await landing.landed(6)
            assert same(ends, range(8), pages[70:], places[70:])
            settling = asyncio.create_task(route.settled())
            await asyncio.sleep(0.05)
            assert not settling.done()
            computing.is_done()
            await settling
            await route.ahead.confirm(5, 70)
            await landing.landed(5)
            ends.check(pages, places)
            computing.close()

    run(work())


def test_any_number_of_pages_and_layers_leaves(device: Device) -> None:
    async def work() -> None:
        layers = tuple((layer, 32 + layer) for layer in range(32))
        async with joined(device, (4096,) * 64, 500, layers=layers) as (ends, landing, route):
            for tag, (pages, known) in enumerate(((1, 31), (7, 1), (130, 30), (480, 16))):
                computing = Pass(device, known)
                source, destination = some(pages, 500, 2 * tag), some(pages, 505, 2 * tag + 1)
                ends.destination.fill(CANARY)
                landing.expect(tag, destination)
                assert route.ahead is not None
                await route.ahead.write_ahead(source, destination, len(source), computing.computed)
                computing.is_done()
                await route.ahead.confirm(tag, pages)
                await landing.landed(tag)
                ends.check(source, destination)
                computing.close()

    run(work())


def test_where_nothing_is_known_of_a_layer_all_leave_at_the_end(device: Device) -> None:
    async def work() -> None:
        page_bytes, layers = LAYERED
        async with joined(device, page_bytes, 200, layers=layers) as (ends, landing, route):
            computing = Pass(device)
            source, destination = some(150, 200, 1), some(150, 205, 2)
            landing.expect(5, destination)
            assert route.ahead is not None
            last = Computed(computing.computed.before, computing.computed.done)
            await route.ahead.write_ahead(source, destination, 110, last)
            await route.ahead.confirm(5, 150)
            computing.is_nearly_done()
            await asyncio.sleep(0.05)
            assert not landing.in_place(5)
            assert not any(same(ends, (number,), source[40:], destination[40:]) for number in range(8))
            computing.is_done()
            await landing.landed(5)
            ends.check(source, destination)
            computing.close()

    run(work())


def same(ends: Ends, buffers: Iterable[int], source: Pages, destination: Pages) -> bool:
    mine, theirs = ends.source.read(), ends.destination.read()
    return all((mine[buffer][source] == theirs[buffer][destination]).all() for buffer in buffers)


def test_a_route_whose_layers_are_not_known_writes_what_is_computed(device: Device) -> None:
    async def work() -> None:
        async with joined(device, (4096,), 8) as (_, _landing, route):
            assert route.ahead is None

    run(work())


class Prefill:
    """The other process."""

    def __init__(self, device: int, page_bytes: tuple[int, ...], pages: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.transfer.gpu_prefill", str(device)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        self.ask(pages=pages, page_bytes=page_bytes)

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=10)


@contextmanager
def prefill(device: int, page_bytes: tuple[int, ...], pages: int) -> Iterator[Prefill]:
    one = Prefill(device, page_bytes, pages)
    try:
        yield one
    finally:
        one.end()


PAGES, PAGE_BYTES = 512, (128 << 10,) * 16
EVERY = np.arange(PAGES, dtype=np.int32)


def test_another_process_writes_into_this_ones_memory(device: Device, other_device: int) -> None:
    async def work() -> None:
        decode, mine = GpuMemory(device, layout(PAGE_BYTES, PAGES)), GpuMemory(device, layout(PAGE_BYTES, PAGES))
        decode.fill(CANARY)
        mine.pattern()
        landing = await NvlinkTransport(decode.pool).land(NoWire())
        with prefill(other_device, PAGE_BYTES, PAGES) as peer:
            described = base64.b64encode(landing.describe()).decode()
            assert peer.ask(connect=described, pages=PAGES) == {"connected": True}
            source, destination = some(300, PAGES, 3), some(300, PAGES, 4)
            landing.expect(9, destination)
            assert peer.ask(write=[9, source.tolist(), destination.tolist()]) == {"written": True}
            await landing.landed(9)
            for there, here in zip(decode.read(), mine.read(), strict=True):
                assert np.array_equal(there[destination], here[source])
            await landing.disconnect()
            assert "withdrawn" in peer.ask(write=[9, source.tolist(), destination.tolist()])["lost"]
        decode.free()
        mine.free()

    run(work())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_after_a_lost_writer_nothing_lands_any_more_and_the_gpu_goes_on(
    device: Device, other_device: int, how: signal.Signals
) -> None:
    async def work() -> None:
        decode = GpuMemory(device, layout(PAGE_BYTES, PAGES))
        for _ in range(10):
            landing = await NvlinkTransport(decode.pool).land(NoWire())
            with prefill(other_device, PAGE_BYTES, PAGES) as peer:
                peer.ask(connect=base64.b64encode(landing.describe()).decode(), pages=PAGES)
                landing.expect(1, EVERY)
                assert peer.ask(flood=[1, EVERY.tolist(), EVERY.tolist()]) == {"flooding": True}
                await asyncio.sleep(0.1)
                os.kill(peer.process.pid, how)
                if how is signal.SIGSTOP:
                    # Frozen in the middle of a write it keeps its lock: pages stay back until it goes on.
                    waiting = asyncio.create_task(landing.disconnect())
                    await asyncio.sleep(0.2)
                    os.kill(peer.process.pid, signal.SIGCONT)
                    await waiting
                else:
                    await landing.disconnect()
                decode.fill(CANARY)
                await asyncio.sleep(0.3)
                assert all((buffer == CANARY).all() for buffer in decode.read())
        decode.free()

    run(work())


def test_a_writer_outlives_a_decode_process_that_is_killed_while_it_writes(device: Device, other_device: int) -> None:
    """Here the other process is decode: its memory is the one that goes away."""
    with prefill(other_device, PAGE_BYTES, PAGES) as writer:
        before = writer.ask(alive=True)
        decode = subprocess.Popen(
            [sys.executable, "-m", "tests.transfer.gpu_decode", str(device.number), str(PAGES), str(PAGE_BYTES[0])],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert decode.stdout is not None
        described = decode.stdout.readline().strip()
        one_buffer = writer.ask(connect=described, pages=PAGES)
        assert one_buffer == {"connected": True}, one_buffer
        for _ in range(50):
            assert writer.ask(write=[1, EVERY.tolist(), EVERY.tolist()]) == {"written": True}
        decode.kill()
        decode.communicate(timeout=10)
        writer.ask(write=[1, EVERY.tolist(), EVERY.tolist()])
        assert "cuda" not in str(writer.ask(settle=True)).lower()
        assert writer.ask(alive=True) == before
