"""What every transport must do, whichever it is: the same tests for each."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from transfer.layout import PoolLayout
from transfer.plan import Pages
from transfer.pool import Pool, SharedArena
from transfer.tcp import FRAME
from transfer.transport import Landing, Route, RouteLost, Transport, Unreachable
from transfer.transports import make

HAS_NIXL = any(importlib.util.find_spec(name) for name in ("nixl_cu13", "nixl_cu12"))
TRANSPORTS = [
    "shm",
    "tcp",
    pytest.param("nixl", marks=pytest.mark.skipif(not HAS_NIXL, reason="needs mainstem[nixl]")),
]
WITHIN_S = 20.0
STALL_S = 1.0
CANARY = 0xA5

Test = Callable[..., Coroutine[Any, Any, None]]


class Host:
    """A prefill worker's port, as far as a transport sees it (transfer.transport.Wire and Lanes)."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._parked: list[tuple[bytes, socket.socket]] = []
        self.dialled: list[socket.socket] = []
        """Prefill's ends of the lanes."""
        self.reasons: list[str] = []

    async def dial(self, token: bytes) -> socket.socket:
        ours = socket.create_connection(self._listener.getsockname())
        lane = self._listener.accept()[0]
        self.dialled.append(lane)
        self._parked.append((token, lane))
        ours.setblocking(False)
        return ours

    def broken(self, reason: str) -> None:
        self.reasons.append(reason)

    def take(self, token: bytes) -> list[socket.socket]:
        taken = [lane for announced, lane in self._parked if announced == token]
        self._parked = [one for one in self._parked if one[0] != token]
        return taken

    def close(self) -> None:
        self._listener.close()
        for _, lane in self._parked:
            lane.close()


def layout(page_bytes: tuple[int, ...], pages: int) -> PoolLayout:
    return PoolLayout("m", "float32", 16, page_bytes, (), pages)


def pattern(pool: Pool) -> None:
    """Every page of every buffer says which it is."""
    for number, buffer in enumerate(pool.buffers):
        words = buffer.view(np.uint32)
        words[:] = np.arange(len(words), dtype=np.uint32)[:, None] * 64 + number + 1


class Ends:
    """Both ends of one transport, joined: prefill's pool full of patterns, decode's of canaries."""

    def __init__(self, name: str, source: PoolLayout, destination: PoolLayout) -> None:
        self.source = Pool.zeros(source)
        pattern(self.source)
        self.destination, where = SharedArena().pool(destination)
        for buffer in self.destination.buffers:
            buffer[:] = CANARY
        self.host = Host()
        self.writer = self._made(name, self.source, None)
        self.reader = self._made(name, self.destination, where)
        self.landing: Landing
        self.route: Route

    @staticmethod
    def _made(name: str, pool: Pool, where: Any) -> Transport:
        return make([name], pool, shared=where, tcp_lanes=3, nixl_devices=("lo",), stall_s=STALL_S)[0]

    async def join(self) -> tuple[Landing, Route]:
        landing = await self.reader.land(self.host)
        return landing, await self.writer.connect(landing.describe(), self.destination.layout, self.host)

    async def move(self, tag: int, source: Pages, destination: Pages) -> None:
        self.landing.expect(tag, destination)
        self.landing.coming(tag)
        await self.route.write(tag, 0, source, destination)
        await self.landing.landed(tag)

    def untouched(self, but: Pages) -> bool:
        rest = np.ones(self.destination.layout.pages, np.bool_)
        rest[but] = False
        return not any((buffer[rest] != CANARY).any() for buffer in self.destination.buffers)

    def equal(self, source: Pages, destination: Pages) -> bool:
        return all(
            np.array_equal(mine[source], theirs[destination])
            for mine, theirs in zip(self.source.buffers, self.destination.buffers, strict=True)
        )


@asynccontextmanager
async def joined(
    name: str, page_bytes: tuple[int, ...] = (4096, 2048), *, pages: int = 64, more: int = 7
) -> AsyncIterator[Ends]:
    """Ends that are connected, decode's pool larger than prefill's by `more` pages."""
    ends = Ends(name, layout(page_bytes, pages), layout(page_bytes, pages + more))
    async with asyncio.timeout(WITHIN_S):
        ends.landing, ends.route = await ends.join()
        try:
            yield ends
        finally:
            await ends.route.disconnect()
            await ends.landing.disconnect()
            ends.host.close()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def some(count: int, of: int, seed: int) -> npt.NDArray[np.int32]:
    return np.random.default_rng(seed).permutation(of)[:count].astype(np.int32)


def neighbours(count: int, start: int) -> npt.NDArray[np.int32]:
    return np.arange(start, start + count, dtype=np.int32)


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize(
    ("page_bytes", "count"),
    [
        ((2 << 10,), 1),
        ((2 << 10,), 4096),
        ((16 << 10,), 64),
        ((128 << 10,), 65),
        ((2 << 20,), 1),
        ((2 << 20,), 9),
        ((12288,) * 60, 16),
        ((4096, 2048, 8192), 100),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else f"{len(value)}x{value[0]}B",
)
@pytest.mark.parametrize("order", ["fragmented", "contiguous"])
def test_every_page_lands_where_it_belongs_and_nowhere_else(
    name: str, page_bytes: tuple[int, ...], count: int, order: str
) -> None:
    async def work() -> None:
        async with joined(name, page_bytes, pages=count + 3, more=5) as ends:
            if order == "fragmented":
                source, destination = some(count, count + 3, 1), some(count, count + 8, 2)
            else:
                source, destination = neighbours(count, 2), neighbours(count, 7)
            await ends.move(1, source, destination)

            assert ends.equal(source, destination)
            assert ends.untouched(destination)

    run(work())


@pytest.mark.parametrize("name", TRANSPORTS)
def test_chunks_of_one_tag_and_tags_of_one_peer_do_not_mix(name: str) -> None:
    async def work() -> None:
        async with joined(name, pages=200) as ends:
            source, destination = some(160, 200, 1), some(160, 207, 2)
            for tag in range(8):
                ends.landing.expect(tag, destination[tag * 20 : tag * 20 + 20])
                ends.landing.coming(tag)
            for first in (0, 13):
                for tag in range(8):
                    start, end = tag * 20 + first, tag * 20 + (13 if first == 0 else 20)
                    await ends.route.write(tag, first, source[start:end], destination[start:end])
            async with asyncio.TaskGroup() as group:
                for tag in range(8):
                    group.create_task(ends.landing.landed(tag))

            assert ends.equal(source, destination)
            assert ends.untouched(destination)

    run(work())


@pytest.mark.parametrize("name", TRANSPORTS)
def test_several_peers_write_to_one_pool_at_once(name: str) -> None:
    async def work() -> None:
        async with joined(name, pages=90) as ends:
            source, destination = some(90, 90, 1), some(90, 97, 2)
            more = [await ends.join() for _ in range(2)]
            peers = [(ends.landing, ends.route), *more]

            async def move(number: int) -> None:
                landing, route = peers[number]
                part = slice(number * 30, number * 30 + 30)
                # The same tag for all: it is each peer's own.
                landing.expect(7, destination[part])
                landing.coming(7)
                await route.write(7, 0, source[part], destination[part])
                await landing.landed(7)

            async with asyncio.TaskGroup() as group:
                for number in range(3):
                    group.create_task(move(number))
            assert ends.equal(source, destination)
            for landing, route in more:
                await route.disconnect()
                await landing.disconnect()

    run(work())


@pytest.mark.parametrize("name", TRANSPORTS)
def test_no_pages_are_a_hand_off_too(name: str) -> None:
    async def work() -> None:
        async with joined(name) as ends:
            ends.landing.expect(1, neighbours(0, 0))
            await ends.landing.landed(1)
            assert ends.untouched(neighbours(0, 0))

    run(work())


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize(
    ("source", "destination"),
    [((0, 64), (0, 1)), ((0, 1), (0, 71)), ((0, -1), (0, 1)), ((0, 1), (-1, 1)), ((0, 1), (5,))],
    ids=["source", "destination", "source below", "destination below", "lengths"],
)
def test_a_page_that_is_none_is_refused_before_anything_is_written(
    name: str, source: tuple[int, ...], destination: tuple[int, ...]
) -> None:
    async def work() -> None:
        async with joined(name) as ends:
            ends.landing.expect(1, neighbours(2, 0))
            ends.landing.coming(1)
            with pytest.raises(ValueError, match="pages: wanted"):
                await ends.route.write(1, 0, np.array(source, np.int32), np.array(destination, np.int32))
            await ends.landing.fence(1)

            assert ends.untouched(neighbours(0, 0))

    run(work())


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize(
    "description", [b"", b"garbage", b"\x92\x01\x02", bytes(4096), b"\x92\xa2\xff\xfe\x01", b"\x91" * 60_000]
)
def test_a_description_that_leads_nowhere_is_unreachable(name: str, description: bytes) -> None:
    async def work() -> None:
        async with joined(name) as ends:
            with pytest.raises(Unreachable, match=f"^{name}: "):
                await ends.writer.connect(description, ends.destination.layout, ends.host)

    run(work())


@pytest.mark.parametrize("name", ["shm", TRANSPORTS[2]])
def test_a_description_of_another_pool_is_unreachable(name: str) -> None:
    """tcp describes none: its landing takes what its own layout says, and nothing else."""

    async def work() -> None:
        async with joined(name) as ends:
            for other in (layout((4096, 2048), 100_000), layout((4096,), 71)):
                with pytest.raises(Unreachable, match=f"^{name}: "):
                    await ends.writer.connect(ends.landing.describe(), other, ends.host)

    run(work())


@pytest.mark.parametrize("name", TRANSPORTS)
def test_nothing_lands_once_the_landing_is_disconnected(name: str) -> None:
    async def work() -> None:
        async with joined(name) as ends:
            ends.landing.expect(1, neighbours(8, 0))
            ends.landing.coming(1)
            await ends.landing.disconnect()
            for buffer in ends.destination.buffers:
                buffer[:] = CANARY

            async def write() -> None:
                # A socket takes bytes for a peer that is gone until it hears of it.
                while True:
                    await ends.route.write(1, 0, neighbours(8, 0), neighbours(8, 0))
                    await asyncio.sleep(0.001)

            with pytest.raises(RouteLost):
                await write()
            assert ends.untouched(neighbours(0, 0))

    run(work())


@pytest.mark.parametrize("name", TRANSPORTS)
@pytest.mark.parametrize("gone", ["landing", "route"])
@pytest.mark.parametrize("after_s", [0.0, 0.002, 0.01])
def test_an_end_that_goes_in_the_middle_of_a_write_leaves_nobody_waiting(name: str, gone: str, after_s: float) -> None:
    async def work() -> None:
        async with joined(name, (1 << 20,), pages=64) as ends:
            every = neighbours(64, 0)
            ends.landing.expect(1, every)
            ends.landing.coming(1)

            async def write() -> None:
                while True:
                    await ends.route.write(1, 0, every, every)

            writing = asyncio.create_task(write())
            landed = asyncio.create_task(ends.landing.landed(1)) if name == "tcp" else None
            await asyncio.sleep(after_s)
            if gone == "landing":
                await ends.landing.disconnect()
                for buffer in ends.destination.buffers:
                    buffer[:] = CANARY
            else:
                await ends.route.disconnect()

            with pytest.raises(RouteLost):
                await writing
            if gone == "landing":
                assert ends.untouched(neighbours(0, 0))
            if landed is not None:
                # All of it may have landed before.
                await asyncio.wait({landed})
                assert landed.exception() is None or isinstance(landed.exception(), RouteLost)

    run(work())


@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_second_disconnect_does_nothing(name: str) -> None:
    async def work() -> None:
        async with joined(name) as ends:
            for _ in range(2):
                await ends.route.disconnect()
                await ends.landing.disconnect()

    run(work())


@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_fence_under_a_tag_lets_the_others_go_on(name: str) -> None:
    async def work() -> None:
        async with joined(name) as ends:
            ends.landing.expect(1, neighbours(8, 0))
            ends.landing.expect(2, neighbours(8, 20))
            ends.landing.coming(2)
            await ends.landing.fence(1)
            await ends.landing.fence(1)
            await ends.landing.fence(99)

            await ends.route.write(2, 0, neighbours(8, 5), neighbours(8, 20))
            await ends.landing.landed(2)
            assert ends.equal(neighbours(8, 5), neighbours(8, 20))
            assert ends.untouched(neighbours(8, 20))

    run(work())


def test_what_tcp_sends_under_a_tag_that_is_over_is_dropped() -> None:
    async def work() -> None:
        async with joined("tcp", (64 << 10,), pages=64) as ends:
            for tag in range(20):
                ends.landing.expect(tag, neighbours(32, 0))
                writing = asyncio.create_task(ends.route.write(tag, 0, neighbours(32, 0), neighbours(32, 0)))
                await asyncio.sleep(0.0002 * tag)
                await ends.landing.fence(tag)
                ends.destination.buffers[0][:] = CANARY
                await writing
                await asyncio.sleep(0.01)
                assert ends.untouched(neighbours(0, 0))

    run(work())


def test_tcp_lets_nobody_write_a_page_twice_or_one_that_is_not_expected() -> None:
    async def work() -> None:
        for first, count in ((0, 9), (6, 3), (4_000_000_000, 8)):
            async with joined("tcp") as ends:
                ends.landing.expect(1, neighbours(8, 10))
                await ends.route.write(1, first, neighbours(count, 0), neighbours(count, 10))

                with pytest.raises(RouteLost, match="wanted pages that are missing"):
                    await ends.landing.landed(1)
                assert ends.untouched(neighbours(8, 10))
                async with asyncio.timeout(5):
                    while not ends.host.reasons:  # the loop tells of it after the lane's thread did
                        await asyncio.sleep(0.01)
                assert "wanted pages that are missing" in ends.host.reasons[0]

    run(work())


def test_a_fence_waits_for_a_lane_that_still_reads_when_another_has_ended() -> None:
    async def work() -> None:
        async with joined("tcp", (1 << 20,), pages=2) as ends:
            *others, slow = ends.host.dialled
            ends.landing.expect(1, neighbours(2, 0))
            page = ends.source.buffers[0][0].tobytes()
            slow.sendall(FRAME.pack(1, 0, 1) + page[:1000])
            await asyncio.sleep(0.05)
            for lane in others:
                lane.shutdown(socket.SHUT_RDWR)
            await asyncio.sleep(0.05)

            fence = asyncio.create_task(ends.landing.fence(1))
            await asyncio.sleep(0.1)
            assert not fence.done()
            slow.sendall(page[1000:])
            await fence

    run(work())
