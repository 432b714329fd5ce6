"""Page events over real sockets: what a worker holds is in the index, whatever was lost on the way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from router.fake_worker import FakeWorker, Handoffs
from router.fleet import FeedMode, Fleet
from router.follower import Follower
from router.index import NODE_BYTES, Index
from transfer.auth import ClusterKey
from transfer.pages import chain_ids, root_id

IDS = chain_ids(root_id("x"), range(20), 1)


class Side:
    """A follower with its index, told of workers as a router is."""

    def __init__(self, key: ClusterKey, index_max_bytes: int = 10**6) -> None:
        self.index, self.fleet = Index(index_max_bytes), Fleet()
        self.follower = Follower(key, self.index, self.fleet, time.monotonic, lambda ended: None)

    def hear(self, worker: FakeWorker) -> None:
        self.fleet.register(worker.registration(), time.monotonic())
        self.follower.registered(worker.registration())

    def mode(self, worker: FakeWorker) -> FeedMode:
        return self.fleet[worker.name].mode


async def until(holds: Callable[[], bool]) -> None:
    """Waits for it, with a deadline."""
    async with asyncio.timeout(15):
        while not holds():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def followed(index_max_bytes: int = 10**6, **settings: Any) -> AsyncIterator[tuple[Side, FakeWorker]]:
    key = ClusterKey.generate()
    side = Side(key, index_max_bytes)
    worker = FakeWorker("p0", "prefill", key, Handoffs(), **settings)
    await worker.start()
    try:
        yield side, worker
    finally:
        await side.follower.close()
        await worker.stop()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A test that is a coroutine, with a deadline."""

    def inner() -> None:
        asyncio.run(asyncio.wait_for(test(), 30))

    inner.__name__ = test.__name__
    return inner


@run
async def test_what_was_stored_before_first_contact_is_known_after_it() -> None:
    async with followed() as (side, worker):
        await worker.store(root_id("x"), 0, IDS[:10])
        worker.forget_journal()  # so it takes a snapshot, in four parts
        side.hear(worker)

        await until(lambda: side.mode(worker) is FeedMode.EXACT)

        assert side.index.match(IDS) == {"p0": 10}
        assert worker.questions == [(0, 0)]


@run
async def test_events_are_followed_as_they_come() -> None:
    async with followed() as (side, worker):
        side.hear(worker)
        await until(lambda: side.mode(worker) is FeedMode.EXACT)

        await worker.store(root_id("x"), 0, IDS[:4])
        side.hear(worker)  # should the subscription have come later than the event, this shows it
        await until(lambda: side.index.match(IDS) == {"p0": 4})
        await worker.store(IDS[3], 4, IDS[4:8])
        await until(lambda: side.index.match(IDS) == {"p0": 8})
        await worker.evict(IDS[6:8])
        await until(lambda: side.index.match(IDS) == {"p0": 6})
        await worker.clear()
        await until(lambda: side.index.match(IDS) == {})


@run
async def test_a_lost_event_is_asked_for_when_the_next_one_shows_the_gap() -> None:
    async with followed() as (side, worker):
        side.hear(worker)
        await worker.store(root_id("x"), 0, IDS[:2])
        side.hear(worker)
        await until(lambda: side.index.match(IDS) == {"p0": 2})

        worker.lose_batches = 1
        await worker.store(IDS[1], 2, IDS[2:4])
        await worker.store(IDS[3], 4, IDS[4:6])

        await until(lambda: side.index.match(IDS) == {"p0": 6})
        assert (worker.epoch, 1) in worker.questions


@run
async def test_a_lost_last_event_is_asked_for_when_the_worker_says_how_far_it_is() -> None:
    async with followed() as (side, worker):
        side.hear(worker)
        await worker.store(root_id("x"), 0, IDS[:2])
        side.hear(worker)
        await until(lambda: side.index.match(IDS) == {"p0": 2})

        worker.lose_batches = 1
        await worker.evict(IDS[1:2])
        side.hear(worker)

        await until(lambda: side.index.match(IDS) == {"p0": 1})


@run
async def test_a_restarted_worker_holds_nothing_that_it_held_before() -> None:
    async with followed() as (side, worker):
        await worker.store(root_id("x"), 0, IDS[:5])
        side.hear(worker)
        await until(lambda: side.index.match(IDS) == {"p0": 5})

        async with restarted(worker) as again:
            await again.store(root_id("x"), 0, IDS[:1])
            side.hear(again)
            await until(lambda: side.mode(again) is FeedMode.EXACT and side.index.match(IDS) == {"p0": 1})


@asynccontextmanager
async def restarted(worker: FakeWorker) -> AsyncIterator[FakeWorker]:
    again = FakeWorker(worker.name, worker.role, worker.key, worker.handoffs, epoch=worker.epoch + 1)
    await again.start()
    try:
        yield again
    finally:
        await again.stop()


@run
async def test_a_forgotten_worker_is_followed_again_from_nothing() -> None:
    async with followed() as (side, worker):
        await worker.store(root_id("x"), 0, IDS[:5])
        side.hear(worker)
        await until(lambda: side.index.match(IDS) == {"p0": 5})

        side.follower.forget("p0")
        assert side.index.match(IDS) == {}
        side.hear(worker)

        await until(lambda: side.index.match(IDS) == {"p0": 5})


@run
async def test_who_lacks_the_clusters_key_learns_and_teaches_nothing() -> None:
    async with followed() as (side, worker):
        stranger = Side(ClusterKey.generate())
        await worker.store(root_id("x"), 0, IDS[:5])
        try:
            stranger.hear(worker)
            side.hear(worker)
            await until(lambda: side.mode(worker) is FeedMode.EXACT)
            await asyncio.sleep(0.3)

            assert worker.questions == [(0, 0)]  # one, though two asked
            assert stranger.mode(worker) is FeedMode.CATCHING_UP
            assert len(stranger.index) == 0
        finally:
            await stranger.follower.close()


@run
async def test_a_worker_whose_pages_found_no_room_is_approximate_until_it_clears_them() -> None:
    async with followed(index_max_bytes=4 * NODE_BYTES) as (side, worker):
        await worker.store(root_id("x"), 0, IDS[:4])
        side.hear(worker)
        await until(lambda: side.mode(worker) is FeedMode.EXACT)

        await worker.store(IDS[3], 4, IDS[4:6])
        await until(lambda: side.mode(worker) is FeedMode.APPROXIMATE)
        assert side.index.match(IDS) == {"p0": 4}

        await worker.clear()
        await until(lambda: side.mode(worker) is FeedMode.EXACT)
