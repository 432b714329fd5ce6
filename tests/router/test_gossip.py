"""Each router counts what the others have sent, whatever is lost, repeated or late, and forgets who is gone."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from router.app import Router, create_app
from router.config import RouterSection, RouterSpec
from router.fake_worker import FakeWorker, Handoffs
from router.fleet import Fleet
from router.gossip import (
    CHANGED_S,
    EXPIRE_S,
    NOTHING,
    UNCHANGED_S,
    VERSION,
    Announcer,
    Elsewhere,
    Loads,
    Peers,
    WorkerLoad,
    decode,
    encode,
)
from router.gossip_link import GossipLink
from router.server import listen
from transfer.auth import ClusterKey

TokenizerFolder = Callable[[str], Path]


def load(tokens: int, epoch: int = 1) -> WorkerLoad:
    return WorkerLoad(epoch, tokens, 1, tokens / 100, 2, 3 * tokens)


def loads(router: str, sequence: int, workers: dict[str, WorkerLoad], life: int = 1) -> Loads:
    return Loads(VERSION, router, life, sequence, workers)


def test_loads_of_all_other_routers_are_summed_for_the_workers_present_life() -> None:
    peers = Peers("router")
    peers.heard(loads("router-1", 1, {"p0": load(100), "p1": load(7)}), 0)
    peers.heard(loads("router-2", 1, {"p0": load(20)}), 0)
    peers.heard(loads("router-3", 1, {"p0": load(5, epoch=2)}), 0)

    assert peers.elsewhere("p0", 1) == Elsewhere(120, 2, 1.2, 4, 360)
    assert peers.elsewhere("p0", 2) == Elsewhere(5, 1, 0.05, 2, 15)
    assert peers.elsewhere("p0", 3) is NOTHING
    assert peers.elsewhere("p9", 1) is NOTHING


@given(st.data())
def test_whatever_is_lost_repeated_or_late_the_newest_that_came_counts(data: st.DataObject) -> None:
    """What one router says over two lives, through a bad network."""
    said = [
        loads("router-1", sequence, {"p0": load(1000 * life + sequence)}, life)
        for life in (1, 2)
        for sequence in (1, 2, 3)
    ]
    came = data.draw(st.lists(st.sampled_from(said), min_size=1, max_size=20))
    peers = Peers("router")
    for one in came:
        peers.heard(one, 0)

    newest = max(came, key=lambda one: (one.life, one.sequence))
    assert peers.elsewhere("p0", 1).outstanding_tokens == newest.workers["p0"].outstanding_tokens


def test_a_worker_that_is_not_named_any_more_has_nothing_in_flight_from_there() -> None:
    peers = Peers("router")
    peers.heard(loads("router-1", 1, {"p0": load(100)}), 0)
    peers.heard(loads("router-1", 2, {}), 0)

    assert peers.elsewhere("p0", 1) is NOTHING


def test_a_router_that_falls_silent_is_forgotten_and_one_that_speaks_is_not() -> None:
    peers = Peers("router")
    peers.heard(loads("router-1", 1, {"p0": load(100)}), 0)
    peers.heard(loads("router-2", 1, {"p0": load(20)}), 0)
    peers.heard(loads("router-2", 2, {"p0": load(20)}), EXPIRE_S)

    assert peers.expire(EXPIRE_S) == []
    assert peers.expire(EXPIRE_S + 0.1) == ["router-1"]
    assert peers.elsewhere("p0", 1).outstanding_tokens == 20
    # Should it have been only silent, what it says next counts.
    assert peers.heard(loads("router-1", 2, {"p0": load(100)}), EXPIRE_S + 0.2)


def test_nobody_counts_what_it_said_itself_nor_what_it_cannot_understand() -> None:
    peers = Peers("router")

    assert not peers.heard(loads("router", 1, {"p0": load(100)}), 0)
    assert not peers.heard(Loads(VERSION + 1, "router-1", 1, 1, {"p0": load(100)}), 0)
    assert list(peers) == []


def test_what_changed_is_said_soon_and_what_did_not_is_repeated() -> None:
    announcer = Announcer("router", 1)

    assert announcer.due({}, 0) == loads("router", 1, {})
    assert announcer.due({}, UNCHANGED_S / 2) is None
    assert announcer.due({}, UNCHANGED_S) == loads("router", 2, {})
    assert announcer.due({"p0": load(1)}, UNCHANGED_S + CHANGED_S / 2) is None
    assert announcer.due({"p0": load(1)}, UNCHANGED_S + 2 * CHANGED_S) == loads("router", 3, {"p0": load(1)})


def test_a_message_is_read_back_as_it_was() -> None:
    said = loads("router", 7, {"p0": load(100), "d0": load(0)})

    assert decode(encode(said)) == said


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(15):
        while not holds():
            await asyncio.sleep(0.005)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Site:
    """Two routers in front of the same two workers, each with an address of its own."""

    def __init__(self, routers: list[Router], urls: list[str], workers: dict[str, FakeWorker]) -> None:
        self.routers = routers
        self.urls = urls
        self.workers = workers
        self.requests: list[asyncio.Task[int]] = []

    async def send(self, session: aiohttp.ClientSession, to: int, count: int) -> None:
        """Begins so many streams at this router. They stay in flight until the decode worker's gate opens."""
        before = self.routers[to].fleet["d0"].inflight_requests

        async def one(number: int) -> int:
            messages = [{"role": "user", "content": f"{to} {number} " * 20}]
            body = {"model": "tiny", "messages": messages, "stream": True, "max_tokens": 4}
            async with session.post(f"{self.urls[to]}/v1/chat/completions", data=json.dumps(body)) as answer:
                await answer.read()
                return answer.status

        self.requests += [asyncio.create_task(one(number)) for number in range(count)]
        await until(lambda: self.routers[to].fleet["d0"].inflight_requests == before + count)


@asynccontextmanager
async def two_routers(folder: Path, key_file: Path) -> AsyncIterator[tuple[Site, AsyncExitStack]]:
    """The stack's last entry is the second router: closing it ends that one."""
    key = ClusterKey.generate()
    key.write(key_file)
    ports = [free_port(), free_port()]
    handoffs = Handoffs()
    async with AsyncExitStack() as stack:
        workers = {
            name: FakeWorker(name, role, key, handoffs)  # type: ignore[arg-type]
            for name, role in (("p0", "prefill"), ("d0", "decode"))
        }
        routers, urls, servers = [], [], []
        for number in range(2):
            spec = RouterSpec(
                section=RouterSection(replicas=2),
                model="tiny",
                model_path=folder,
                key_file=key_file,
                cluster="test",
                name=f"router-{number}" if number else "router",
                gossip_port=ports[number],
                peers=(f"tcp://127.0.0.1:{ports[1 - number]}",),
            )
            router = Router(spec)
            bound = stack.enter_context(listen("127.0.0.1", 0))
            config = uvicorn.Config(create_app(router), log_config=None, access_log=False, timeout_graceful_shutdown=1)
            server = uvicorn.Server(config)
            serving = asyncio.create_task(server.serve(sockets=[bound]))
            routers.append(router)
            urls.append(f"http://127.0.0.1:{bound.getsockname()[1]}")
            servers.append((server, serving))
        for server, _ in servers:
            await until(lambda server=server: server.started)  # type: ignore[misc]
        for worker in workers.values():
            await worker.start()
            stack.push_async_callback(worker.stop)
            for url in urls:
                worker.renew(url, 0.2)
        site = Site(routers, urls, workers)
        last = AsyncExitStack()
        for end_of, (server, serving) in ((stack, servers[0]), (last, servers[1])):
            end_of.push_async_callback(_end, server, serving)
        stack.push_async_callback(last.aclose)
        for router in routers:
            await until(lambda router=router: not router.unready())  # type: ignore[misc]
        try:
            yield site, last
        finally:
            workers["d0"].gate.set()
            for request in site.requests:
                request.cancel()
            await asyncio.gather(*site.requests, return_exceptions=True)


async def _end(server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
    server.should_exit = True
    await serving


def test_each_of_two_routers_counts_what_the_other_has_sent_and_forgets_it_when_it_is_over(
    tokenizer_folder: TokenizerFolder, tmp_path: Path
) -> None:
    async def work() -> None:
        async with (
            two_routers(tokenizer_folder("chatml"), tmp_path / "key") as (site, last),
            aiohttp.ClientSession() as session,
        ):
            site.workers["d0"].gate.clear()
            await site.send(session, 0, 3)
            await site.send(session, 1, 2)
            first, second = (router.fleet["d0"] for router in site.routers)

            await until(lambda: (first.elsewhere.inflight_requests, second.elsewhere.inflight_requests) == (2, 3))
            assert first.elsewhere.inflight_tokens == second.inflight_tokens > 0
            assert second.elsewhere.inflight_tokens == first.inflight_tokens

            site.workers["d0"].gate.set()
            await until(lambda: first.elsewhere == second.elsewhere == NOTHING)
            assert await asyncio.gather(*site.requests) == [200] * 5

            # One that ends takes its load with it.
            site.workers["d0"].gate.clear()
            await site.send(session, 1, 4)
            await until(lambda: first.elsewhere.inflight_requests == 4)
            await last.aclose()
            await until(lambda: first.elsewhere == NOTHING)
            assert first.inflight_requests == 0

    asyncio.run(asyncio.wait_for(work(), 40))


@asynccontextmanager
async def linked(
    name: str, key: ClusterKey, clock_s: Callable[[], float], life: int = 1
) -> AsyncIterator[tuple[Fleet, GossipLink]]:
    """One router's fleet, which knows a worker, and its link, not started yet."""
    fleet = Fleet()
    link = GossipLink(key, fleet, name=name, host="localhost", port=0, life=life, clock_s=clock_s)
    try:
        yield fleet, link
    finally:
        await link.close()


def test_the_load_of_a_router_that_dies_without_a_word_is_forgotten() -> None:
    ahead_s = 0.0

    def clock_s() -> float:
        return time.monotonic() + ahead_s

    async def work() -> None:
        nonlocal ahead_s
        key = ClusterKey.generate()
        worker = FakeWorker("p0", "prefill", key, Handoffs())
        await worker.start()
        registration = worker.registration()
        async with linked("router", key, clock_s) as (fleet, link), linked("router-1", key, clock_s) as (other, dying):
            for one in (fleet, other):
                one.register(registration, clock_s())
            other["p0"].outstanding_uncached_tokens = 500
            other["p0"].outstanding_prefills = 2
            link.start([dying.address])
            dying.start([link.address])
            await until(lambda: fleet["p0"].elsewhere.outstanding_tokens == 500)
            assert fleet["p0"].elsewhere.outstanding_requests == 2

            assert dying._task is not None
            dying._task.cancel()
            await asyncio.sleep(0.1)
            assert fleet["p0"].elsewhere.outstanding_tokens == 500
            ahead_s = EXPIRE_S + 0.1
            await until(lambda: fleet["p0"].elsewhere is NOTHING)
        await worker.stop()

    asyncio.run(asyncio.wait_for(work(), 20))


def test_a_router_that_ends_says_so_and_is_not_waited_for() -> None:
    async def work() -> None:
        key = ClusterKey.generate()
        worker = FakeWorker("p0", "prefill", key, Handoffs())
        await worker.start()
        # To the one that listens no time passes, so nothing expires there.
        async with linked("router", key, lambda: 0.0) as (fleet, link):
            async with linked("router-1", key, time.monotonic) as (other, leaving):
                for one in (fleet, other):
                    one.register(worker.registration(), 0.0)
                other["p0"].outstanding_uncached_tokens, other["p0"].outstanding_prefills = 500, 2
                link.start([leaving.address])
                leaving.start([])
                await until(lambda: fleet["p0"].elsewhere.outstanding_tokens == 500)
            await until(lambda: fleet["p0"].elsewhere is NOTHING)
        await worker.stop()

    asyncio.run(asyncio.wait_for(work(), 20))


def test_who_lacks_the_clusters_key_is_not_heard() -> None:
    async def work() -> None:
        key = ClusterKey.generate()
        clock_s = time.monotonic
        async with (
            linked("router", key, clock_s) as (_, link),
            linked("router-1", key, clock_s) as (_, friend),
            linked("router-2", ClusterKey.generate(), clock_s) as (_, stranger),
        ):
            link.start([friend.address, stranger.address])
            friend.start([])
            stranger.start([link.address])
            await until(lambda: list(link.peers) == ["router-1"])
            await asyncio.sleep(0.2)

            assert list(link.peers) == ["router-1"]
            assert list(stranger.peers) == []

    asyncio.run(asyncio.wait_for(work(), 20))
