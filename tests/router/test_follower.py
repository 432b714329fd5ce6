"""Page events over real sockets: what a worker holds is in the index, whatever was lost on the way."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import pytest

from router.audit import Audits
from router.fake_worker import FakeWorker, Handoffs
from router.fleet import FeedMode, Fleet
from router.follower import Follower
from router.index import NODE_BYTES, Index
from router.sequence import CUT_OFF_S
from transfer.auth import ClusterKey
from transfer.pages import chain_ids, root_id
from transfer.wire import Batch, Cleared, Registration, Stored

IDS = chain_ids(root_id("x"), range(20), 1)


class Side:
    """A follower with its index, told of workers as a router is."""

    def __init__(self, key: ClusterKey, index_max_bytes: int = 10**6) -> None:
        self.index, self.fleet, self.audits = Index(index_max_bytes), Fleet(), Audits()
        self.ahead_s = 0.0
        """How far the follower's clock is ahead: a test need not sit out what it can skip."""
        self.follower = Follower(key, self.index, self.fleet, self.now_s, lambda decode, ended: None, self.audits)

    def now_s(self) -> float:
        return time.monotonic() + self.ahead_s

    def hear(self, worker: FakeWorker, registration: Registration | None = None) -> None:
        """Takes in a registration: this one, or what the worker would say now."""
        registration = registration or worker.registration()
        self.fleet.register(registration, self.now_s())
        self.follower.registered(registration)

    def mode(self, worker: FakeWorker) -> FeedMode:
        return self.fleet[worker.name].mode


async def until(holds: Callable[[], bool]) -> None:
    """Waits for it, with a deadline."""
    async with asyncio.timeout(15):
        while not holds():
            await asyncio.sleep(0.01)


class Way:
    """A connection's way through a network that can be cut: it takes bytes all the time, and forwards them or not."""

    def __init__(self, target: str) -> None:
        self._host, self._port = target.removeprefix("tcp://").split(":")
        self._open = asyncio.Event()
        self._open.set()
        self._writers: list[asyncio.StreamWriter] = []
        self.address = ""

    @asynccontextmanager
    async def laid(self) -> AsyncIterator[Way]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            self.mend()
            for writer in self._writers:
                writer.close()

    def cut(self) -> None:
        self._open.clear()

    def mend(self) -> None:
        self._open.set()

    async def _connected(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        far, on = await asyncio.open_connection(self._host, int(self._port))
        self._writers += [back, on]
        await asyncio.gather(self._pump(near, on), self._pump(far, back))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65_536):
                await self._open.wait()
                sink.write(data)
        sink.close()


@asynccontextmanager
async def through_ways(worker: FakeWorker) -> AsyncIterator[tuple[Way, Way, Callable[[], Registration]]]:
    """The ways of events and of answers, and what the worker registers where it is reached over them."""
    told = worker.registration()
    async with Way(told.events).laid() as events, Way(told.replay).laid() as replay:
        yield (
            events,
            replay,
            lambda: msgspec.structs.replace(worker.registration(), events=events.address, replay=replay.address),
        )


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
            assert stranger.mode(worker) is FeedMode.LOAD_ONLY
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


async def exact_with(side: Side, worker: FakeWorker, pages: int) -> None:
    """Follows the worker, which holds the first `pages` pages, until nothing that it says is missed."""
    await worker.store(root_id("x"), 0, IDS[:pages])
    side.hear(worker)
    await until(lambda: side.mode(worker) is FeedMode.EXACT and side.index.match(IDS) == {"p0": pages})
    await audited(side, worker)


async def audited(side: Side, worker: FakeWorker, **sample: int) -> None:
    """Audits until one was looked at: none that comes too soon after another, or before the subscription is there."""
    before = side.audits["p0"].audits
    async with asyncio.timeout(20):
        while side.audits["p0"].audits == before:
            await worker.audit(**sample)
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    while side.audits["p0"].audits == before:
                        await asyncio.sleep(0.01)


@run
async def test_batches_in_any_order_and_more_than_once_lead_to_what_the_worker_holds() -> None:
    async with followed() as (side, worker):
        await exact_with(side, worker, 2)
        worker.lose_batches = 3
        for depth in (2, 4, 6):
            await worker.store(IDS[depth - 1], depth, IDS[depth : depth + 2])
        questions = len(worker.questions)

        for number in (4, 2, 3, 4, 2, 1):
            depth = 2 * number - 2
            parent = IDS[depth - 1] if depth else root_id("x")
            await worker.publish(Batch("p0", worker.epoch, number, [Stored(parent, depth, IDS[depth : depth + 2])]))
        await worker.audit()

        await until(lambda: side.index.match(IDS) == {"p0": 8} and side.mode(worker) is FeedMode.EXACT)
        await until(lambda: side.audits["p0"].agreement == 1.0)
        assert len(worker.questions) <= questions + 1


@run
async def test_a_late_batch_of_a_workers_last_life_changes_nothing() -> None:
    async with followed() as (side, worker):
        await exact_with(side, worker, 5)
        async with restarted(worker) as again:
            await exact_with(side, again, 3)

            late = Stored(IDS[2], 3, IDS[3:5])
            await again.publish(Batch("p0", worker.epoch, 2, [late]))
            await again.publish(Batch("p0", worker.epoch, 3, [Cleared()]))
            await again.store(IDS[2], 3, IDS[3:4])  # what is said after them has come: they have, too

            await until(lambda: side.index.match(IDS) == {"p0": 4})
            assert side.mode(again) is FeedMode.EXACT
            assert worker.questions == [(0, 0)]


@run
async def test_a_flush_of_the_cache_that_was_lost_is_made_good() -> None:
    async with followed() as (side, worker):
        await exact_with(side, worker, 6)
        worker.lose_batches = 1
        await worker.clear()
        await worker.store(root_id("x"), 0, IDS[:2])

        await until(lambda: side.index.match(IDS) == {"p0": 2} and side.mode(worker) is FeedMode.EXACT)


@run
async def test_a_lost_last_event_shows_in_the_next_audit_without_a_registration() -> None:
    async with followed() as (side, worker):
        await exact_with(side, worker, 4)
        worker.lose_batches = 1
        await worker.evict(IDS[2:4])
        await worker.audit()

        await until(lambda: side.index.match(IDS) == {"p0": 2} and side.mode(worker) is FeedMode.EXACT)
        assert side.audits["p0"].refuted == 0


@run
async def test_a_worker_that_is_cut_off_is_load_only_after_some_seconds_and_exact_soon_after_it_is_back() -> None:
    async with followed() as (side, worker), through_ways(worker) as (events, replay, told):
        await worker.store(root_id("x"), 0, IDS[:4])
        side.hear(worker, told())
        await until(lambda: side.mode(worker) is FeedMode.EXACT)

        events.cut()
        replay.cut()
        await worker.store(IDS[3], 4, IDS[4:6])
        side.hear(worker, told())  # its lease is renewed: HTTP takes another way
        side.ahead_s += 2  # more than a lag
        await until(lambda: side.mode(worker) is FeedMode.APPROXIMATE)
        assert side.index.match(IDS) == {"p0": 4}
        side.ahead_s += CUT_OFF_S
        await until(lambda: side.mode(worker) is FeedMode.LOAD_ONLY)
        side.ahead_s += 5
        side.hear(worker, told())
        assert side.mode(worker) is FeedMode.LOAD_ONLY

        events.mend()
        replay.mend()
        await until(lambda: side.mode(worker) is FeedMode.EXACT and side.index.match(IDS) == {"p0": 6})


@run
async def test_a_worker_whose_publisher_alone_is_cut_off_is_followed_by_questions() -> None:
    async with followed(audit_s=0.05) as (side, worker), through_ways(worker) as (events, _, told):
        await worker.store(root_id("x"), 0, IDS[:4])
        side.hear(worker, told())
        await until(lambda: side.mode(worker) is FeedMode.EXACT)

        events.cut()
        await worker.evict(IDS[2:4])
        side.ahead_s += 2  # silent for longer than two audits and a lag, and no registration has come

        await until(lambda: side.index.match(IDS) == {"p0": 2} and side.mode(worker) is FeedMode.EXACT)


@run
async def test_pages_that_the_index_has_wrong_are_found_by_an_audit_and_taken_anew() -> None:
    async with followed() as (side, worker):
        await exact_with(side, worker, 8)
        side.index.removed("p0", IDS[5:8])  # as a bug or a bit would
        side.index.stored("p0", root_id("y"), 0, [4711])

        await audited(side, worker, modulus=1)

        await until(lambda: side.index.match(IDS) == {"p0": 8} and side.mode(worker) is FeedMode.APPROXIMATE)
        assert side.index.match([4711]) == {}
        healed = side.audits["p0"]
        assert (healed.refuted, healed.heals) == (1, 1)
        assert healed.agreement == 5 / 9
        await audited(side, worker)
        await until(lambda: side.mode(worker) is FeedMode.EXACT)
        assert side.audits["p0"].agreement == 1.0


@run
async def test_pages_that_found_no_place_after_one_that_was_dropped_by_mistake_are_taken_anew() -> None:
    async with followed() as (side, worker):
        await exact_with(side, worker, 8)
        side.index.removed("p0", IDS[7:8])
        await worker.store(IDS[7], 8, IDS[8:10])
        await until(lambda: side.index.orphans > 0 and side.mode(worker) is FeedMode.APPROXIMATE)

        await audited(side, worker)

        await until(lambda: side.index.match(IDS) == {"p0": 10})
        assert side.audits["p0"].heals == 1


@run
async def test_an_audit_of_some_pages_finds_what_is_wrong_among_them_alone() -> None:
    async with followed() as (side, worker):
        await exact_with(side, worker, 20)
        side.index.removed("p0", IDS[19:])
        other = (IDS[19] + 1) % 3

        await audited(side, worker, modulus=3, residue=other)
        assert side.mode(worker) is FeedMode.EXACT
        await audited(side, worker, modulus=3, residue=IDS[19] % 3)

        await until(lambda: side.audits["p0"].heals == 1 and side.index.match(IDS) == {"p0": 20})


@pytest.mark.parametrize("room", [4, 2000])
def test_an_index_without_room_is_not_taken_for_a_wrong_one(room: int) -> None:
    asyncio.run(asyncio.wait_for(_an_index_without_room(room), 30))


async def _an_index_without_room(room: int) -> None:
    ids = chain_ids(root_id("x"), range(2 * room), 1)
    async with followed(index_max_bytes=room * NODE_BYTES) as (side, worker):
        await worker.store(root_id("x"), 0, ids[: room + 2])
        side.hear(worker)
        await until(lambda: side.mode(worker) is FeedMode.APPROXIMATE)

        await worker.store(ids[room + 1], room + 2, ids[room + 2 : room + 4])
        side.hear(worker)
        await audited(side, worker)

        assert side.audits["p0"].heals == 0
        assert 0 < side.audits["p0"].agreement < 1


@pytest.mark.thorough
@run
async def test_after_ten_seconds_of_silence_connections_are_made_anew_and_nothing_is_missing() -> None:
    async with followed(audit_s=0.5) as (side, worker), through_ways(worker) as (events, replay, told):
        await worker.store(root_id("x"), 0, IDS[:4])
        side.hear(worker, told())
        await until(lambda: side.mode(worker) is FeedMode.EXACT)

        events.cut()
        replay.cut()
        await worker.evict(IDS[3:4])
        for _ in range(10):
            await asyncio.sleep(1)
            side.hear(worker, told())
        assert side.mode(worker) is FeedMode.LOAD_ONLY
        events.mend()
        replay.mend()

        await until(lambda: side.mode(worker) is FeedMode.EXACT and side.index.match(IDS) == {"p0": 3})
        before = side.audits["p0"].audits
        await until(lambda: side.audits["p0"].audits > before + 1)
        assert side.audits["p0"].agreement == 1.0
