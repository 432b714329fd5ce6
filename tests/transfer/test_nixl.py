"""What is NIXL's own: where it listens, what may come in, and that a closed agent is a fence."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, ParamSpec

import msgspec
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.layout import PoolLayout
from transfer.nixl import NixlLanding, NixlRoute, NixlTransport, ucx_transports
from transfer.plan import Pages
from transfer.pool import Pool
from transfer.transport import RouteLost, Unreachable

nixl = pytest.importorskip("nixl_cu13")

LAYOUT = PoolLayout(
    model="m", dtype="float32", page_tokens=16, page_bytes=(4096, 512, 12288), aux_row_bytes=(), pages=256
)
LARGE = PoolLayout(model="m", dtype="float32", page_tokens=16, page_bytes=(131072,), aux_row_bytes=(), pages=512)
WITHIN_S = 20.0
"""Hang protection."""

PEER = """
import asyncio, json, sys, zlib
import msgspec, numpy as np
from transfer.layout import PoolLayout
from transfer.nixl import NixlTransport
from transfer.pool import Pool
from transfer.transport import RouteLost

class Wire:
    async def dial(self, token): raise AssertionError("nixl dials nothing")
    def broken(self, reason): print(json.dumps("broken " + reason), flush=True)

async def main():
    pool = Pool.zeros(msgspec.json.decode(sys.argv[1], type=PoolLayout))
    for buffer in pool.buffers:
        buffer[:] = 255
    transport = NixlTransport(pool, devices=("lo",))
    loop, writing = asyncio.get_running_loop(), None
    def crc(pages):
        return zlib.crc32(b"".join(buffer[pages].tobytes() for buffer in pool.buffers))
    async def write_until_lost(pages):
        pages = np.asarray(pages, np.int32)
        try:
            while True:
                await route.write(1, 0, pages, pages)
        except RouteLost as error:
            return str(error)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        verb, *arguments = json.loads(line)
        answer = None
        match verb, arguments:
            case "land", []:
                landing = await transport.land(Wire())
                answer = landing.describe().hex()
            case "coming", [tag]:
                landing.expect(tag, np.empty(0, np.int32))
                landing.coming(tag)
            case "landed", [tag, pages]:
                await landing.landed(tag)
                answer = crc(pages)
            case "disconnect", []:
                await landing.disconnect()
            case "connect", [description]:
                route = await transport.connect(bytes.fromhex(description), pool.layout, None)
            case "write until lost", [pages]:
                writing = loop.create_task(write_until_lost(pages))
            case "lost", []:
                answer = await writing
        print(json.dumps(answer), flush=True)

asyncio.run(main())
"""


P = ParamSpec("P")


def run(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """A test that is a coroutine."""

    @functools.wraps(test)
    def inner(*arguments: P.args, **named: P.kwargs) -> None:
        asyncio.run(test(*arguments, **named))

    return inner


class NoWire:
    """NIXL asks nothing of the hand-off connection; what it reports is kept."""

    def __init__(self) -> None:
        self.reports: list[str] = []

    async def dial(self, token: bytes) -> socket.socket:
        raise AssertionError("nixl dials nothing")

    def broken(self, reason: str) -> None:
        self.reports.append(reason)


class NoLanes:
    def take(self, token: bytes) -> list[socket.socket]:
        raise AssertionError("nixl wants no lanes")


@dataclass
class Peer:
    """The other worker, in a process of its own."""

    process: subprocess.Popen[str]

    async def ask(self, *command: object) -> Any:
        async with asyncio.timeout(WITHIN_S):
            return await asyncio.to_thread(self._ask, json.dumps(command))

    def _ask(self, line: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def listening(self) -> set[str]:
        return listening(self.process.pid)


@contextlib.asynccontextmanager
async def peer(layout: PoolLayout) -> AsyncIterator[Peer]:
    process = subprocess.Popen(
        [sys.executable, "-c", PEER, msgspec.json.encode(layout).decode()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Peer(process)
    finally:
        # In this order: a thread that still waits for an answer sees the pipe end.
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def filled(layout: PoolLayout, seed: int) -> Pool:
    pool, random = Pool.zeros(layout), np.random.default_rng(seed)
    for buffer in pool.buffers:
        buffer[:] = random.integers(0, 256, buffer.shape, np.uint8)
    return pool


def transport(pool: Pool, write_s: float = WITHIN_S) -> NixlTransport:
    return NixlTransport(pool, devices=("lo",), write_s=write_s)


def crc(pool: Pool, pages: Pages) -> int:
    return zlib.crc32(b"".join(buffer[pages].tobytes() for buffer in pool.buffers))


def listening(pid: int) -> set[str]:
    """Addresses, with ports."""
    connections = psutil.Process(pid).net_connections(kind="inet")
    return {f"{c.laddr.ip} {c.laddr.port}" for c in connections if c.status == psutil.CONN_LISTEN}


def pages(*indices: int) -> Pages:
    return np.array(indices, np.int32)


async def pair(mine: Pool, theirs: Pool) -> tuple[NixlRoute, NixlLanding]:
    """Both ends in this process."""
    landing = await transport(theirs).land(NoWire())
    route = await transport(mine).connect(landing.describe(), theirs.layout, NoLanes())
    return route, landing


def changed(description: bytes, index: int, value: object) -> bytes:
    fields = msgspec.msgpack.decode(description)
    fields[index] = value
    return msgspec.msgpack.encode(fields)


@run
@pytest.mark.thorough
async def test_pages_that_were_written_are_in_place_when_the_writer_says_so() -> None:
    mine, random = filled(LAYOUT, 1), np.random.default_rng(2)
    async with peer(LAYOUT) as decode:
        route = await transport(mine).connect(bytes.fromhex(await decode.ask("land")), LAYOUT, NoLanes())
        for tag in range(500):
            count = int(random.integers(1, 33))
            source, destination = (random.permutation(LAYOUT.pages)[:count].astype(np.int32) for _ in range(2))
            for buffer in mine.buffers:
                buffer[source, :8] = np.frombuffer(tag.to_bytes(8, "little"), np.uint8)
            await decode.ask("coming", tag)

            await route.write(tag, 0, source, destination)

            assert await decode.ask("landed", tag, destination.tolist()) == crc(mine, source), tag
        await route.disconnect()


@run
async def test_neighbours_and_both_ends_of_every_buffer_arrive_and_nothing_else_changes() -> None:
    mine, theirs = filled(LAYOUT, 1), Pool.zeros(LAYOUT)
    route, landing = await pair(mine, theirs)
    source = pages(255, 0, 1, 2, 254)
    destination = pages(0, 253, 254, 255, 1)
    landing.expect(1, destination)
    landing.coming(1)

    await route.write(1, 0, source, destination)
    await landing.landed(1)

    for ours, other in zip(mine.buffers, theirs.buffers, strict=True):
        assert np.array_equal(other[destination], ours[source])
        assert not other[2:253].any()
    await route.disconnect()
    await landing.disconnect()


@run
async def test_pools_of_different_size_fit() -> None:
    small, theirs = msgspec.structs.replace(LAYOUT, pages=8), Pool.zeros(LAYOUT)
    mine = filled(small, 1)
    route, landing = await pair(mine, theirs)
    landing.expect(1, pages(200, 100))
    landing.coming(1)

    await route.write(1, 0, pages(7, 3), pages(200, 100))

    assert crc(theirs, pages(200, 100)) == crc(mine, pages(7, 3))
    await route.disconnect()
    await landing.disconnect()


@pytest.mark.parametrize(
    ("source", "destination"), [([0], [256]), ([0], [-1]), ([256], [0]), ([-1], [0]), ([0, 1], [0])]
)
@run
async def test_a_page_that_is_none_is_refused_before_anything_is_written(
    source: list[int], destination: list[int]
) -> None:
    mine, theirs = filled(LAYOUT, 1), Pool.zeros(LAYOUT)
    route, landing = await pair(mine, theirs)
    landing.expect(1, pages(5))
    landing.coming(1)

    with pytest.raises(ValueError, match="pages: wanted"):
        await route.write(1, 0, pages(5, *source), pages(5, *destination))

    assert not any(buffer.any() for buffer in theirs.buffers)
    await route.write(1, 0, pages(5), pages(5))
    assert crc(theirs, pages(5)) == crc(mine, pages(5))
    await route.disconnect()
    await landing.disconnect()


@run
async def test_it_listens_on_the_named_device_alone_and_on_nothing_once_disconnected() -> None:
    before = listening(os.getpid())
    of_device = {address.address for address in psutil.net_if_addrs()["lo"]}
    mine, theirs = filled(LAYOUT, 1), Pool.zeros(LAYOUT)
    one, other = await pair(mine, theirs), await pair(mine, theirs)
    both = listening(os.getpid()) - before

    await one[0].disconnect()
    await one[1].disconnect()
    left = listening(os.getpid()) - before
    await other[1].disconnect()
    await other[0].disconnect()

    assert len(both) == 4
    assert {entry.split()[0] for entry in both} <= of_device
    assert left < both
    assert len(left) == 2
    assert listening(os.getpid()) == before


@run
async def test_a_peer_that_leaves_disturbs_no_other() -> None:
    mine, theirs = filled(LAYOUT, 1), Pool.zeros(LAYOUT)
    (gone, gone_landing), (route, landing) = await pair(mine, theirs), await pair(mine, theirs)
    for each in (gone_landing, landing):
        each.expect(1, pages(9))
        each.coming(1)

    await gone.disconnect()
    await gone_landing.disconnect()
    await route.write(1, 0, pages(3), pages(9))

    assert crc(theirs, pages(9)) == crc(mine, pages(3))
    await route.disconnect()
    await landing.disconnect()


@run
async def test_a_second_disconnect_does_nothing_and_nothing_is_written_after_the_first() -> None:
    route, landing = await pair(filled(LAYOUT, 1), Pool.zeros(LAYOUT))
    await landing.disconnect()
    await landing.disconnect()
    await route.disconnect()
    await route.disconnect()

    with pytest.raises(RouteLost, match="disconnected"):
        await route.write(1, 0, pages(1), pages(1))
    landing.expect(1, pages(1))
    landing.coming(1)
    with pytest.raises(RouteLost, match="disconnected"):
        await landing.landed(1)


@run
async def test_a_frozen_writer_changes_nothing_once_it_was_disconnected() -> None:
    theirs = Pool.zeros(LARGE)
    every = np.arange(LARGE.pages, dtype=np.int32)
    landing = await transport(theirs).land(NoWire())
    async with peer(LARGE) as prefill:
        await prefill.ask("connect", landing.describe().hex())
        landing.expect(1, every)
        landing.coming(1)
        await prefill.ask("write until lost", every.tolist())
        async with asyncio.timeout(WITHIN_S):
            while not theirs.buffers[0].any():
                await asyncio.sleep(0.001)
        prefill.send(signal.SIGSTOP)

        async with asyncio.timeout(WITHIN_S):
            await landing.disconnect()
        theirs.buffers[0][:] = 0
        prefill.send(signal.SIGCONT)

        assert "Disconnect" in await prefill.ask("lost")
        assert not theirs.buffers[0].any()


@run
async def test_a_killed_writer_is_disconnected() -> None:
    before = listening(os.getpid())
    landing = await transport(Pool.zeros(LARGE)).land(NoWire())
    async with peer(LARGE) as prefill:
        await prefill.ask("connect", landing.describe().hex())
        landing.expect(1, pages(0))
        landing.coming(1)
        await prefill.ask("write until lost", list(range(LARGE.pages)))
        prefill.send(signal.SIGKILL)
        prefill.process.wait()

    async with asyncio.timeout(WITHIN_S):
        await landing.disconnect()

    assert listening(os.getpid()) == before


@run
async def test_a_process_that_is_being_written_to_can_end() -> None:
    async with peer(LAYOUT) as decode:
        await decode.ask("land")
        await decode.ask("coming", 1)
        assert decode.process.stdin is not None
        decode.process.stdin.close()

        ended = await asyncio.to_thread(decode.process.wait, WITHIN_S)

        assert ended == 0


@pytest.mark.parametrize("while_writing", [True, False])
@run
async def test_a_route_to_a_killed_reader_is_lost(while_writing: bool) -> None:
    every = np.arange(LARGE.pages, dtype=np.int32)
    async with peer(LARGE) as decode:
        # The write's own deadline lies beyond the test's: it must not be what ends it.
        sender = transport(filled(LARGE, 1), write_s=10 * WITHIN_S)
        route = await sender.connect(bytes.fromhex(await decode.ask("land")), LARGE, NoLanes())
        await decode.ask("coming", 1)
        await route.write(1, 0, every, every)

        async def write_until_lost() -> None:
            while True:
                await route.write(1, 0, every, every)

        writing = asyncio.create_task(write_until_lost()) if while_writing else None
        await asyncio.sleep(0.05)
        decode.send(signal.SIGKILL)
        decode.process.wait()

        with pytest.raises(RouteLost, match="Disconnect"):
            async with asyncio.timeout(WITHIN_S):
                await (writing or write_until_lost())
        with pytest.raises(RouteLost, match="Disconnect"):
            await route.write(1, 0, every, every)
        await route.disconnect()


@run
async def test_a_write_to_a_frozen_reader_ends_and_so_does_its_agent() -> None:
    before = listening(os.getpid())
    every = np.arange(LARGE.pages, dtype=np.int32)
    async with peer(LARGE) as decode:
        sender = transport(filled(LARGE, 1), write_s=0.2)
        route = await sender.connect(bytes.fromhex(await decode.ask("land")), LARGE, NoLanes())
        await decode.ask("coming", 1)
        decode.send(signal.SIGSTOP)

        with pytest.raises(RouteLost, match=r"not written within 0\.2 s"):
            async with asyncio.timeout(WITHIN_S):
                await route.write(1, 0, every, every)

        async with asyncio.timeout(WITHIN_S):
            while listening(os.getpid()) != before:
                await asyncio.sleep(0.01)
            await route.disconnect()


@run
async def test_a_write_ends_when_its_route_is_disconnected() -> None:
    every = np.arange(LARGE.pages, dtype=np.int32)
    # Not coming, hence not polled: the write cannot end by itself.
    route, landing = await pair(filled(LARGE, 1), Pool.zeros(LARGE))
    writing = asyncio.create_task(route.write(1, 0, every, every))
    await asyncio.sleep(0.05)

    async with asyncio.timeout(WITHIN_S):
        await route.disconnect()
        with pytest.raises(RouteLost, match="disconnected"):
            await writing

    await landing.disconnect()


@run
async def test_a_cancelled_write_takes_its_route_with_it() -> None:
    before = listening(os.getpid())
    every = np.arange(LARGE.pages, dtype=np.int32)
    route, landing = await pair(filled(LARGE, 1), Pool.zeros(LARGE))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await route.write(1, 0, every, every)

    with pytest.raises(RouteLost, match="cancelled"):
        await route.write(1, 0, every, every)

    await route.disconnect()
    await landing.disconnect()
    assert listening(os.getpid()) == before


@pytest.mark.parametrize(
    ("index", "change", "said"),
    [
        (1, lambda _: "FILE", "Invalid enum value"),
        (2, lambda _: -1, "device: wanted 0, found -1"),
        (3, lambda pages: pages + 1, "pages: wanted 256, found 257"),
        (4, lambda sizes: [*sizes[:-1], 1], "page_bytes: wanted"),
        (4, lambda sizes: sizes[:-1], "page_bytes: wanted"),
        (5, lambda bases: bases[:-1], "bases: wanted 3, found 2"),
        (5, lambda bases: [0, *bases[1:]], "bases: wanted addresses"),
        (5, lambda bases: [-1, *bases[1:]], "bases: wanted addresses"),
        (5, lambda bases: [2**64 - 4096, *bases[1:]], "bases: wanted addresses"),
        (0, lambda _: b"", "nixl"),
        (0, lambda agent: agent[:-1], "nixl"),
    ],
)
@run
async def test_a_description_that_fits_no_landing_is_refused_with_the_difference(
    index: int, change: Callable[[Any], object], said: str
) -> None:
    before = listening(os.getpid())
    theirs = Pool.zeros(LAYOUT)
    landing = await transport(theirs).land(NoWire())
    good = landing.describe()
    bad = changed(good, index, change(msgspec.msgpack.decode(good)[index]))

    with pytest.raises(Unreachable, match=said):
        await transport(filled(LAYOUT, 1)).connect(bad, LAYOUT, NoLanes())

    await landing.disconnect()
    assert listening(os.getpid()) == before


@run
async def test_pages_of_another_size_are_refused() -> None:
    landing = await transport(Pool.zeros(LARGE)).land(NoWire())

    with pytest.raises(Unreachable, match="page_bytes: wanted"):
        await transport(Pool.zeros(LAYOUT)).connect(landing.describe(), LARGE, NoLanes())

    await landing.disconnect()


@given(st.binary(max_size=64))
def test_bytes_that_are_no_description_are_refused(noise: bytes) -> None:
    with pytest.raises(Unreachable, match="nixl"):
        asyncio.run(transport(Pool.zeros(LAYOUT)).connect(noise, LAYOUT, NoLanes()))


@run
async def test_devices_of_the_environment_are_not_overruled_but_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_NET_DEVICES", "eth7")

    with pytest.raises(Unreachable, match="UCX_NET_DEVICES: wanted lo, found eth7"):
        await transport(Pool.zeros(LAYOUT)).land(NoWire())


@run
async def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set first, so that what the transport leaves in the environment is undone.
    monkeypatch.setenv("UCX_NET_DEVICES", "")
    monkeypatch.delenv("UCX_NET_DEVICES")
    absent = NixlTransport(Pool.zeros(LAYOUT), devices=("absent0",))

    with pytest.raises(Unreachable, match="absent0"):
        await absent.land(NoWire())


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl_cu13", None)
    monkeypatch.setitem(sys.modules, "nixl_cu12", None)

    with pytest.raises(Unreachable, match=r"mainstem\[nixl\]"):
        transport(Pool.zeros(LAYOUT))


@pytest.mark.parametrize(
    ("devices", "gpu", "wanted"),
    [
        (("lo",), False, "tcp"),
        (("lo", "eth0"), True, "tcp,cuda_copy"),
        (("mlx5_0:1", "mlx5_1:1"), False, "rc,ud,dc"),
        (("mlx5_0:1", "eth0"), True, "rc,ud,dc,tcp,cuda_copy"),
    ],
)
def test_ucx_may_use_only_what_ends_with_its_agent(devices: tuple[str, ...], gpu: bool, wanted: str) -> None:
    assert ucx_transports(devices, gpu=gpu) == wanted


@pytest.mark.parametrize("devices", [(), ("",), ("lo,eth0",)])
def test_devices_that_are_none_are_refused(devices: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="devices: wanted"):
        NixlTransport(Pool.zeros(LAYOUT), devices=devices)
