"""The agent over real sockets: what a router is told, and what it gets when it missed something."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from aiohttp import web

from engine.agent import Agent
from engine.outbox import Outbox
from engine.spec import WorkerSpec, page_socket
from transfer import wire
from transfer.auth import SIGNATURE_HEADER, ClusterKey
from transfer.ended import Ended

FACTS = {"page_size": 16, "max_total_num_tokens": 4096, "context_length": 2048, "dtype": "float32"}
LOADS = {
    "loads": [{"num_running_reqs": 2, "num_waiting_reqs": 1, "num_waiting_uncached_tokens": 40, "num_used_tokens": 640}]
}


class Site:
    """An engine's and a router's HTTP face on one port: what the agent talks to."""

    def __init__(self, key: ClusterKey) -> None:
        self.key = key
        self.registrations: list[wire.Registration] = []
        self.freezes = 0
        self.facts: dict[str, Any] = FACTS
        self.freezing = 200
        """What the engine answers to that."""
        self.url = ""

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[Site]:
        app = web.Application()
        app.router.add_get("/server_info", self._server_info)
        app.router.add_get("/v1/loads", _loads)
        app.router.add_post("/freeze_gc", self._freeze)
        app.router.add_post("/internal/register", self._register)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = str(runner.addresses[0][1])
        try:
            yield self
        finally:
            await runner.cleanup()

    async def _server_info(self, _: web.Request) -> web.Response:
        return web.json_response(self.facts)

    async def _freeze(self, _: web.Request) -> web.Response:
        assert all(registration.state == "starting" for registration in self.registrations)
        self.freezes += 1
        return web.Response(status=self.freezing)

    async def _register(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.key.verify(request.headers.get(SIGNATURE_HEADER), body, time.time())
        self.registrations.append(msgspec.json.decode(body, type=wire.Registration))
        return web.Response(body=msgspec.json.encode(wire.Registered(router="r")))

    async def until(self, condition: Callable[[wire.Registration], bool]) -> wire.Registration:
        async with asyncio.timeout(10):
            while True:
                for registration in self.registrations:
                    if condition(registration):
                        return registration
                await asyncio.sleep(0.01)


async def _loads(_: web.Request) -> web.Response:
    return web.json_response(LOADS)


def free_port() -> int:
    with zmq.Context() as context, context.socket(zmq.PUB) as socket:
        return socket.bind_to_random_port("tcp://127.0.0.1")


def run(work: Callable[[Site, WorkerSpec, ClusterKey], Awaitable[None]], tmp_path: Path) -> None:
    async def main() -> None:
        key = ClusterKey.generate()
        async with Site(key).serve() as site:
            spec = WorkerSpec(
                name="prefill-0",
                role="prefill",
                host="127.0.0.1",
                port=int(site.url),
                handoff_port=4242,
                events_port=free_port(),
                replay_port=free_port(),
                model_path="/model",
                served_model="m",
                page_tokens=16,
                routers=(f"http://127.0.0.1:{site.url}",),
                key_file="unused",
                run_dir=str(tmp_path),
                renew_s=0.05,
            )
            await work(site, spec, key)

    asyncio.run(main())


def test_a_worker_is_starting_until_its_engine_speaks_then_ready_with_the_engines_own_facts(tmp_path: Path) -> None:
    async def work(site: Site, spec: WorkerSpec, key: ClusterKey) -> None:
        agent = Agent(spec, epoch=77, key=key)
        await asyncio.to_thread(agent.start)
        starting = await site.until(lambda registration: registration.state == "starting")
        agent.engine_ready()
        ready = await site.until(lambda registration: registration.state == "ready")
        await asyncio.to_thread(agent.close)

        assert (starting.worker, starting.epoch, starting.role) == ("prefill-0", 77, "prefill")
        assert (ready.page_tokens, ready.capacity_tokens, ready.max_context_tokens) == (16, 4096, 2048)
        assert (ready.handoff_host, ready.handoff_port, ready.kv_dtype) == ("127.0.0.1", 4242, "float32")
        assert ready.load == wire.Load(
            running_requests=2, waiting_requests=1, waiting_uncached_tokens=40, used_tokens=640
        )
        assert site.registrations[-1].leaving
        assert site.freezes == 1

    run(work, tmp_path)


@pytest.mark.parametrize(
    ("attempts", "chunk", "wanted"), [(0, 512, 0), (1, 512, 512), (1, -1, 2048), (1, None, 2048)], ids=str
)
def test_what_is_computed_before_decode_grants_pages_is_a_chunk_or_nothing(
    tmp_path: Path, attempts: int, chunk: int | None, wanted: int
) -> None:
    async def work(site: Site, spec: WorkerSpec, key: ClusterKey) -> None:
        site.facts = {**FACTS, "optimistic_prefill_attempts": attempts, "chunked_prefill_size": chunk}
        agent = Agent(spec, epoch=77, key=key)
        await asyncio.to_thread(agent.start)
        agent.engine_ready()
        ready = await site.until(lambda registration: registration.state == "ready")
        await asyncio.to_thread(agent.close)
        assert ready.ungranted_tokens == wanted

    run(work, tmp_path)


def test_an_engine_that_does_not_freeze_is_ready_nevertheless(tmp_path: Path) -> None:
    async def work(site: Site, spec: WorkerSpec, key: ClusterKey) -> None:
        site.freezing = 404
        agent = Agent(spec, epoch=77, key=key)
        await asyncio.to_thread(agent.start)
        agent.engine_ready()
        await site.until(lambda registration: registration.state == "ready")
        await asyncio.to_thread(agent.close)
        assert site.freezes == 1

    run(work, tmp_path)


def test_events_of_the_scheduler_reach_a_router_and_a_late_one_catches_up(tmp_path: Path) -> None:
    async def work(site: Site, spec: WorkerSpec, key: ClusterKey) -> None:
        agent = Agent(spec, epoch=77, key=key)
        await asyncio.to_thread(agent.start)
        context = zmq.asyncio.Context.instance()
        with context.socket(zmq.SUB) as live, context.socket(zmq.DEALER) as late:
            for socket, port in ((live, spec.events_port), (late, spec.replay_port)):
                key.secure_client(socket)
                socket.connect(f"tcp://127.0.0.1:{port}")
            live.subscribe(b"")
            await asyncio.sleep(0.3)  # a SUB socket hears what is published after it has connected
            outbox = Outbox(page_socket(spec))
            outbox.put(wire.Stored(1, 0, [10, 11]))

            async with asyncio.timeout(10):
                heard = wire.decode_page_message(await live.recv())
            await late.send(wire.encode(wire.PageRequest(0, 0)))
            async with asyncio.timeout(10):
                answer = [wire.decode_page_message(await late.recv()) for _ in range(2)]

            assert heard == wire.Batch("prefill-0", 77, 1, [wire.Stored(1, 0, [10, 11])])
            assert answer == [
                wire.Snapshot("prefill-0", 77, 0, [wire.Stored(1, 0, [10, 11])]),
                wire.CaughtUp("prefill-0", 77, 1),
            ]
            registration = await site.until(lambda registration: registration.sequence == 1)
            assert registration.held_pages == 2

            await asyncio.to_thread(outbox.close)
            for unreadable in (b"no page request", b"\x93\xa2\xff\xfe\x01\x01", b"\x91" * 60_000):
                await late.send(unreadable)
            await late.send(wire.encode(wire.PageRequest(77, 1)))
            async with asyncio.timeout(10):
                assert wire.decode_page_message(await late.recv()) == wire.CaughtUp("prefill-0", 77, 1)
        await asyncio.to_thread(agent.close)

    run(work, tmp_path)


def test_audits_stand_in_the_stream_right_after_the_batches_that_they_are_about(tmp_path: Path) -> None:
    async def work(site: Site, spec: WorkerSpec, key: ClusterKey) -> None:
        agent = Agent(msgspec.structs.replace(spec, audit_s=0.01), epoch=77, key=key)
        await asyncio.to_thread(agent.start)
        context = zmq.asyncio.Context.instance()
        with context.socket(zmq.SUB) as live:
            key.secure_client(live)
            live.connect(f"tcp://127.0.0.1:{spec.events_port}")
            live.subscribe(b"")
            audited: list[int] = []
            applied: set[int] = set()
            position = 0
            outbox = Outbox(page_socket(spec))
            async with asyncio.timeout(10):
                await live.recv()  # an audit: from here on nothing is missed
                for page in range(1, 21):
                    outbox.put(wire.Stored(1, 0, [page]))
                    await asyncio.sleep(0.005)
                while len(applied) < 20 or audited[-1] < 20:
                    match wire.decode_published(await live.recv()):
                        case wire.Batch(sequence=sequence, events=events):
                            assert sequence == position + 1
                            position = sequence
                            applied.update(page for event in events for page in event.ids)  # type: ignore[union-attr]
                        case wire.Audit() as audit:
                            assert (audit.worker, audit.epoch, audit.sequence) == ("prefill-0", 77, position)
                            assert set(audit.ids) == applied
                            assert audit.held_pages == len(applied)
                            audited.append(len(applied))
            assert len(set(audited)) > 1
            assert (await site.until(lambda one: one.held_pages == 20)).audit_s == 0.01
            await asyncio.to_thread(outbox.close)
        await asyncio.to_thread(agent.close)

    run(work, tmp_path)


def test_handoffs_are_published_as_they_end_and_their_sums_stand_in_every_registration(tmp_path: Path) -> None:
    async def work(site: Site, spec: WorkerSpec, key: ClusterKey) -> None:
        agent = Agent(msgspec.structs.replace(spec, name="decode-0", role="decode"), epoch=77, key=key)
        await asyncio.to_thread(agent.start)
        context = zmq.asyncio.Context.instance()
        with context.socket(zmq.SUB) as live:
            key.secure_client(live)
            live.connect(f"tcp://127.0.0.1:{spec.events_port}")
            live.subscribe(b"")
            await asyncio.sleep(0.3)  # a SUB socket hears what is published after it has connected
            outbox = Outbox(page_socket(spec))
            told = [
                Ended(1, "prefill-0", "shm", 3, 300, prefix_tokens=32, took_s=0.5, reason="", computing_s=0.25),
                Ended(2, "prefill-0", "shm", 4, 400, prefix_tokens=0, took_s=0.25, reason=""),
                Ended(3, "prefill-1", "tcp", 5, 0, prefix_tokens=16, took_s=1.0, reason="lost"),
            ]
            for one in told:
                outbox.ended(one)
            outbox.put(wire.Stored(1, 0, [10, 11]))

            heard: list[Ended] = []
            batches: list[wire.Batch] = []
            async with asyncio.timeout(10):
                while len(heard) < 3 or not batches:
                    message = wire.decode_published(await live.recv())
                    assert (message.worker, message.epoch) == ("decode-0", 77)
                    if isinstance(message, wire.Batch):
                        batches.append(message)
                    elif isinstance(message, wire.Handoffs):
                        heard += message.ended
            assert heard == told
            # What is no page event takes no number of theirs.
            assert [batch.sequence for batch in batches] == [1]
            registration = await site.until(lambda one: sum(totals.handoffs for totals in one.handoffs) == 3)
            assert registration.handoffs == [
                wire.HandoffTotals("prefill-0", "shm", "ok", 2, 7, 700, 32, 0.75, handover_s=0.5),
                wire.HandoffTotals("prefill-1", "tcp", "failed", 1, 0, 0, 0, 1.0),
            ]
            await asyncio.to_thread(outbox.close)
        await asyncio.to_thread(agent.close)
        assert site.registrations[-1].leaving
        assert site.registrations[-1].handoffs == registration.handoffs

    run(work, tmp_path)


def test_a_port_in_use_is_an_error_at_once(tmp_path: Path) -> None:
    async def work(site: Site, spec: WorkerSpec, key: ClusterKey) -> None:
        taken = msgspec.structs.replace(spec, events_port=int(site.url))
        with pytest.raises(zmq.ZMQError, match="in use"):
            await asyncio.to_thread(Agent(taken, epoch=1, key=key).start)

    run(work, tmp_path)
