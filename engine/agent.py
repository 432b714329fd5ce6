"""Beside each engine: says who it is, what it holds and how loaded it is, to every router.

    scheduler ── ipc ──> PULL ┐                ┌─ PUB    ══> routers      page events, audits, ended hand-offs
                              ├── Journal ─────┤
    router ── DEALER ──> ROUTER┘               └─ ROUTER ──> that router  what it missed
    engine's /v1/loads ───────> Registration ───── POST ───> routers      each renewal is a heartbeat

It lives in a thread of the worker's HTTP process: it is up exactly as long as the
worker, and knows nothing that the engine did not say.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import aiohttp
import msgspec
import zmq
import zmq.asyncio

from engine.journal import Journal
from engine.outbox import decode_burst
from engine.spec import WorkerSpec, page_socket
from transfer import wire
from transfer.auth import SIGNATURE_HEADER, ClusterKey
from transfer.courier import Courier
from transfer.undecodable import UNDECODABLE

log = logging.getLogger(__name__)
_decode_registered = msgspec.json.Decoder(wire.Registered).decode

ENGINE_TIMEOUT_S = 5.0
"""For a question to the engine of this worker."""
ROUTER_TIMEOUT_S = 2.0
"""For a registration: a router that does not answer must not delay the others' leases."""
LEASE_RENEWALS = 5
"""A lease outlives so many missed renewals."""
CLOSE_TIMEOUT_S = 3.0
UNSENT_MESSAGES = 20_000
"""Kept for a router that takes nothing; more are dropped for it, and it asks for them when it is back."""


class EngineFacts(msgspec.Struct, frozen=True):
    """What the engine says about itself once it is up (`/server_info`)."""

    page_size: int
    max_total_num_tokens: int
    context_length: int | None = None
    dtype: str = ""
    kv_cache_dtype: str = "auto"
    optimistic_prefill_attempts: int = 0
    chunked_prefill_size: int | None = None


class EngineLoad(msgspec.Struct, frozen=True):
    """One rank's part of `/v1/loads`."""

    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    num_used_tokens: int = 0
    num_waiting_uncached_tokens: int | None = 0


class Agent:
    """Starts with `start`, tells routers that the worker is ready after `engine_ready`, says goodbye in `close`."""

    def __init__(self, spec: WorkerSpec, epoch: int, key: ClusterKey) -> None:
        self._spec = spec
        self._key = key
        self._journal = Journal(spec.name, epoch)
        self._facts: EngineFacts | None = None
        self._load = wire.Load()
        self._handoffs: dict[wire.HandoffTotals, wire.HandoffTotals] = {}
        """Sums of this epoch, by the empty sum of their kind."""
        self._said: dict[str, bool] = {}
        self._courier: Courier | None = None
        self._renewing: asyncio.Task[None] | None = None
        self._ready = False
        self._draining = False
        self._hurry = asyncio.Event()
        """Set where the routers are to hear of a change at once."""
        self._moved_s: float | None = None
        """When the scheduler last said that it moves; None: it does not tell."""
        self._pools: wire.Pools | None = None
        """What it had to give then."""

    def start(self) -> None:
        """Binds the sockets and begins to register. Raises OSError for a port in use."""
        self._courier = Courier(f"agent-{self._spec.name}")
        self._courier.run(self._open(), CLOSE_TIMEOUT_S)

    def engine_ready(self) -> None:
        """The engine takes requests. May be called from any thread."""
        self._ready = True

    def close(self) -> None:
        """Tells the routers that this life of the worker is over."""
        if self._courier is None:
            return
        try:
            self._courier.run(self._say_goodbye(), CLOSE_TIMEOUT_S)
        except TimeoutError:
            log.warning("goodbye not delivered: the lease will run out instead")
        self._courier.close()

    async def _open(self) -> None:
        assert self._courier is not None
        spec, context = self._spec, zmq.asyncio.Context.instance()
        with ExitStack() as opened:
            pages = opened.enter_context(context.socket(zmq.PULL))
            pages.set_hwm(0)
            pages.bind(page_socket(spec))
            publisher = opened.enter_context(context.socket(zmq.PUB))
            publisher.set_hwm(UNSENT_MESSAGES)
            replay = opened.enter_context(context.socket(zmq.ROUTER))
            replay.set_hwm(UNSENT_MESSAGES)
            for socket, port in ((publisher, spec.events_port), (replay, spec.replay_port)):
                self._key.secure_server(socket)
                socket.ipv6 = ":" in spec.host
                socket.bind(_tcp(spec.host, port))
            opened.pop_all()
        self._courier.spawn(self._serve_pages(pages, publisher))
        self._courier.spawn(self._replay(replay))
        self._renewing = self._courier.spawn(self._renew())

    async def _serve_pages(self, pages: zmq.asyncio.Socket, publisher: zmq.asyncio.Socket) -> None:
        with pages, publisher:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._publish(pages, publisher))
                both.create_task(self._audit(publisher))

    async def _publish(self, pages: zmq.asyncio.Socket, publisher: zmq.asyncio.Socket) -> None:
        while True:
            try:
                burst = decode_burst(await pages.recv())
            except UNDECODABLE as error:
                log.warning("burst of the scheduler refused: %s", error)
                continue
            if burst.moved is not None:
                self._moved_s, self._pools = time.monotonic(), burst.moved
            if burst.events:
                await publisher.send(wire.encode(self._journal.apply(burst.events)))
            if burst.ended:
                for ended in burst.ended:
                    kind = wire.HandoffTotals.kind(ended)
                    self._handoffs[kind] = self._handoffs.get(kind, kind).plus(ended)
                handoffs = wire.Handoffs(self._spec.name, self._journal.epoch, burst.ended)
                await publisher.send(wire.encode(handoffs))

    async def _audit(self, publisher: zmq.asyncio.Socket) -> None:
        """Sends in the order of the calls, like the batches: an audit stands right after the batch that it names."""
        for turn in itertools.count():
            await asyncio.sleep(self._spec.audit_s)
            await publisher.send(wire.encode(self._journal.audit(turn)))

    async def _replay(self, replay: zmq.asyncio.Socket) -> None:
        with replay:
            while True:
                router, *_, body = await replay.recv_multipart()
                try:
                    request = wire.decode_page_request(body)
                except UNDECODABLE as error:
                    log.warning("page request refused: %s", error)
                    continue
                for message in self._journal.answer(request):
                    await replay.send_multipart([router, wire.encode(message)])

    async def _renew(self) -> None:
        async with self._session() as session:
            while True:
                started_s = time.monotonic()
                if self._ready:
                    await self._look(session)
                await asyncio.gather(*(self._register(session, router, False) for router in self._spec.routers))
                left_s = max(0.0, self._spec.renew_s - (time.monotonic() - started_s))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._hurry.wait(), left_s)
                self._hurry.clear()

    async def _look(self, session: aiohttp.ClientSession) -> None:
        """Reads the engine's facts, once, and its load. An engine too busy to answer keeps its last ones."""
        try:
            if self._facts is None:
                facts = msgspec.convert(await self._ask(session, "/server_info"), EngineFacts, strict=False)
                await self._freeze(session)
                self._facts = facts
            answer = await self._ask(session, "/v1/loads?include=core")
            loads = msgspec.convert(answer["loads"], list[EngineLoad], strict=False)
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
            log.warning("engine did not answer: %s", str(error) or "no answer in time")
            return
        self._load = wire.Load(
            running_requests=sum(load.num_running_reqs for load in loads),
            waiting_requests=sum(load.num_waiting_reqs for load in loads),
            waiting_uncached_tokens=sum(load.num_waiting_uncached_tokens or 0 for load in loads),
            used_tokens=sum(load.num_used_tokens for load in loads),
        )

    async def _freeze(self, session: aiohttp.ClientSession) -> None:
        """What the engine's processes have made until now is not for their garbage collectors any more: a look at all
        of it stops a worker's HTTP process for half a second, now and then (benchmarks/added_ttft, SGLang 0.5.16)."""
        url = _http(self._spec.host, self._spec.port) + "/freeze_gc"
        try:
            async with session.post(url, timeout=aiohttp.ClientTimeout(ENGINE_TIMEOUT_S)) as answer:
                answer.raise_for_status()
        except (aiohttp.ClientError, TimeoutError) as error:
            log.warning("garbage collection not frozen, requests may be held up by it: %s", str(error) or "no answer")

    async def _ask(self, session: aiohttp.ClientSession, path: str) -> Any:
        async with session.get(
            _http(self._spec.host, self._spec.port) + path, timeout=aiohttp.ClientTimeout(ENGINE_TIMEOUT_S)
        ) as answer:
            answer.raise_for_status()
            return await answer.json()

    async def _register(self, session: aiohttp.ClientSession, router: str, leaving: bool) -> None:
        body = msgspec.json.encode(self._registration(leaving))
        headers = {SIGNATURE_HEADER: self._key.sign(body, time.time()), "content-type": "application/json"}
        timeout = aiohttp.ClientTimeout(ROUTER_TIMEOUT_S)
        try:
            async with session.post(
                f"{router}/internal/register", data=body, headers=headers, timeout=timeout
            ) as answer:
                problem = None if answer.status == 200 else f"{answer.status} {(await answer.text())[:200]}"
                if problem is None:
                    self._answered(_decode_registered(await answer.read()))
        except (aiohttp.ClientError, TimeoutError, *UNDECODABLE) as error:
            problem = str(error) or "no answer in time"
        if self._said.get(router) != (problem is None):
            self._said[router] = problem is None
            if problem is None:
                log.info("registered router=%s", router)
            else:
                log.warning("not registered router=%s reason=%s", router, problem)

    def _answered(self, answer: wire.Registered) -> None:
        if answer.drain is not None and answer.drain is not self._draining:
            self._draining = answer.drain
            self._hurry.set()
            log.info("draining" if answer.drain else "taking requests again")

    async def _say_goodbye(self) -> None:
        if self._renewing is not None:
            # A renewal that came after the goodbye would bring the worker back for a whole lease.
            self._renewing.cancel()
            await asyncio.wait({self._renewing})
        async with self._session() as session:
            await asyncio.gather(*(self._register(session, router, True) for router in self._spec.routers))

    def _silent_s(self) -> float:
        """Since the scheduler last moved; 0 until it takes requests, as it loads its model in one go."""
        if self._facts is None or self._moved_s is None:
            return 0.0
        return round(time.monotonic() - self._moved_s, 1)

    def _registration(self, leaving: bool) -> wire.Registration:
        spec, facts = self._spec, self._facts
        host, port, handoff_port, events_port, replay_port = spec.reached_at
        return wire.Registration(
            worker=spec.name,
            epoch=self._journal.epoch,
            role=spec.role,
            state="starting" if facts is None else "draining" if self._draining else "ready",
            url=_http(host, port),
            handoff_host=host if spec.role == "prefill" else "",
            handoff_port=handoff_port if spec.role == "prefill" else 0,
            events=_tcp(host, events_port),
            replay=_tcp(host, replay_port),
            model=spec.served_model,
            page_tokens=facts.page_size if facts else spec.page_tokens,
            kv_dtype=_kv_dtype(facts) if facts else "",
            capacity_tokens=facts.max_total_num_tokens if facts else 0,
            max_context_tokens=_max_context(facts) if facts else 0,
            ungranted_tokens=_ungranted_tokens(facts) if facts and spec.role == "prefill" else 0,
            sequence=self._journal.sequence,
            held_pages=len(self._journal.held),
            audit_s=spec.audit_s,
            load=msgspec.structs.replace(self._load, silent_s=self._silent_s(), pools=self._pools),
            handoffs=list(self._handoffs.values()),
            lease_s=LEASE_RENEWALS * spec.renew_s,
            leaving=leaving,
        )

    @asynccontextmanager
    async def _session(self) -> AsyncIterator[aiohttp.ClientSession]:
        async with aiohttp.ClientSession(trust_env=False) as session:
            yield session


def _http(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _tcp(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _kv_dtype(facts: EngineFacts) -> str:
    return facts.dtype if facts.kv_cache_dtype == "auto" else facts.kv_cache_dtype


def _ungranted_tokens(facts: EngineFacts) -> int:
    """SGLang gives a prompt's pages away again where they are not granted after its first chunk."""
    if not facts.optimistic_prefill_attempts:
        return 0
    chunk = facts.chunked_prefill_size or 0
    return chunk if chunk > 0 else _max_context(facts)


def _max_context(facts: EngineFacts) -> int:
    """Tokens that prompt and answer may have together."""
    return min(facts.context_length or facts.max_total_num_tokens, facts.max_total_num_tokens)
