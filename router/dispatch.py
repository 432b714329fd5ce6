"""One client request from start to end.

    body ─> plan ─> prefill leg ──────────────> 200: the pages were delivered
                 └> decode leg  ──────────────> first bytes ──> relayed as they come ──> end
                     whichever fails first, or the client leaving, ends both

Until decode's first bytes, a failure of either leg is an HTTP error; after them it is an
event of the stream, and prefill's part is over whatever becomes of it. Ending means an
abort to both workers, at once and without waiting for them, and closed connections.
There is no second attempt here.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field

import aiohttp

from router.answer import Seen, StreamWatch, whole
from router.client import Client, ClientGone
from router.config import RouterSection
from router.fleet import Fleet
from router.ledger import Ledger, Outcome, Record
from router.openai import (
    MAX_ROOM,
    ApiError,
    ClientRequest,
    Endpoint,
    Handoff,
    engine_rids,
    leg_body,
    read,
)
from router.placement import Flight, Placement
from router.planner import Plan, Planner, Prompt, render
from router.policy import NoWorker
from router.render import Renderer
from router.upstream import Fault, LegFailed, Upstream, refused
from transfer.wire import Registration

log = logging.getLogger(__name__)

RENDER_INLINE_BYTES = 32 * 1024
"""A longer body is rendered on a thread, so that other streams go on."""
SETTLE_S = 2.0
"""How long prefill's usage is waited for, after the client has its answer, and a client that is told of an error."""
JSON = {"content-type": "application/json"}


@dataclass(slots=True)
class _Run:
    """A request that was sent to its workers."""

    rid: str
    request: ClientRequest
    plan: Plan
    flight: Flight
    record: Record
    headers: dict[str, str]
    deadline_s: float
    lost: asyncio.Future[str]
    """Resolved with the name of a worker that was lost while it was needed."""
    prefilled: bool = False
    seen: Seen = field(default_factory=Seen)

    def needs(self, worker: str) -> bool:
        """Decode's worker is needed to the end, prefill's until it has delivered."""
        if worker == self.plan.decode.name:
            return True
        return worker == self.plan.prefill.name and not self.prefilled and self.record.ttft_s is None


class Dispatcher:
    """Serves `/v1/chat/completions` and `/v1/completions`.

    clock_s  seconds of a steady clock; wall_s seconds since 1970
    on_end   told of every request that was sent to workers, when it is over
    """

    def __init__(
        self,
        *,
        model: str,
        section: RouterSection,
        fleet: Fleet,
        planner: Planner,
        placement: Placement,
        renderer: Renderer,
        upstream: Upstream,
        ledger: Ledger,
        on_end: Callable[[Record], None],
        clock_s: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
        rooms: random.Random | None = None,
    ) -> None:
        self._model = model
        self._section = section
        self._fleet = fleet
        self._planner = planner
        self._placement = placement
        self._renderer = renderer
        self._upstream = upstream
        self._ledger = ledger
        self._on_end = on_end
        self._clock_s = clock_s
        self._wall_s = wall_s
        self._rooms = rooms or random.SystemRandom()
        self._runs: dict[str, _Run] = {}
        self._background: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Waits for aborts that are on their way; each has its deadline."""
        if self._background:
            await asyncio.wait(self._background, timeout=SETTLE_S)

    def worker_lost(self, name: str) -> None:
        """Ends the requests that still need this worker."""
        for run in self._runs.values():
            if run.needs(name) and not run.lost.done():
                run.lost.set_result(name)

    async def serve(self, endpoint: Endpoint, client: Client) -> None:
        """Answers one request. Does not raise for what clients or workers do."""
        rid = uuid.uuid4().hex
        headers = {"x-request-id": rid}
        try:
            raw = await client.body()
            try:
                request = read(endpoint, raw, self._model)
                prompt = await self._render(request)
                chosen = self._plan(request, prompt)
            except ApiError:
                self._ledger.refused(self._wall_s())
                raise
            await self._run(rid, request, prompt, chosen, client, headers)
        except ClientGone:
            return
        except ApiError as error:
            await self._tell(client, error, headers)

    async def _render(self, request: ClientRequest) -> Prompt:
        if len(request.raw) <= RENDER_INLINE_BYTES:
            return render(self._renderer, request)
        return await asyncio.to_thread(render, self._renderer, request)

    def _plan(self, request: ClientRequest, prompt: Prompt) -> Plan:
        try:
            return self._planner.plan(request, prompt, self._clock_s())
        except NoWorker as error:
            raise ApiError(503, str(error), "service_unavailable", code="no_worker") from None

    async def _tell(self, client: Client, error: ApiError | None, headers: Mapping[str, str]) -> None:
        """Ends the client's answer with an error; None: it was told already. Who does not read is not waited for."""
        try:
            async with asyncio.timeout(SETTLE_S):
                if error is None:
                    await client.end()
                elif client.started:
                    await client.write(error.event())
                    await client.end()
                else:
                    await client.answer(error.status, error.body(), {**JSON, **headers})
        except TimeoutError:
            log.info("client does not read rid=%s", headers["x-request-id"])

    async def _run(
        self,
        rid: str,
        request: ClientRequest,
        prompt: Prompt,
        chosen: Plan,
        client: Client,
        headers: dict[str, str],
    ) -> None:
        """Dispatches the request and accounts for it, however it ends."""
        decision = chosen.decision
        headers |= {
            "x-mainstem-prefill": decision.prefill,
            "x-mainstem-decode": decision.decode,
            "x-mainstem-matched-tokens": str(decision.matched_tokens),
        }
        started_s = self._clock_s()
        record = Record(
            id=rid,
            at_s=self._wall_s(),
            started_s=started_s,
            endpoint=request.endpoint.value,
            stream=request.stream,
            decision=decision,
            unrendered=prompt.unrendered,
            prompt_tokens=prompt.tokens,
        )
        flight = self._placement.send(decision, chosen.pages, started_s)
        deadline_s = started_s + self._section.request_timeout_s
        lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        run = _Run(rid, request, chosen, flight, record, headers, deadline_s, lost)
        self._runs[rid] = run
        self._ledger.begin(record)
        outcome, failed = Outcome.CANCELLED, None
        try:
            await self._relay(run, prompt.ids, client)
            outcome = Outcome.OK
        except LegFailed as error:
            outcome, failed = Outcome.ERROR, error
            log.warning("request failed rid=%s worker=%s fault=%s", rid, failed.worker, failed.fault)
        finally:
            # Also where the task itself is cancelled, at shutdown.
            del self._runs[rid]
            self._settle(run, outcome, None if failed is None else str(failed))
        if failed is not None:
            # Only now: a client that does not read would hold the workers' load.
            await self._tell(client, None if failed.told else _as_api_error(failed), headers)

    def _suspect(self, run: _Run, failed: LegFailed) -> None:
        """A worker that fails at once looks idle, and would get ever more requests to fail."""
        if failed.client_to_blame or failed.fault in (Fault.TIMEOUT, Fault.LOST):
            return
        for worker in (run.plan.prefill, run.plan.decode):
            # Its next life is not to blame.
            if worker.name == failed.worker and self._fleet.get(worker.name) is worker:
                self._fleet.suspect(worker.name, self._clock_s())

    def _settle(self, run: _Run, outcome: Outcome, error: str | None) -> None:
        usage = run.seen.usage
        record, now_s = run.record, self._clock_s()
        record.generated_tokens = usage.completion_tokens if usage is not None else run.seen.token_events
        self._ledger.end(record, outcome, now_s=self._wall_s(), steady_s=now_s, error=error)
        # How fast an answer came that was cut short says nothing of the worker.
        itl_s = record.itl_s if outcome is Outcome.OK else None
        self._placement.ended(run.flight, now_s, itl_s, record.generated_tokens)
        self._on_end(run.record)

    async def _relay(self, run: _Run, ids: list[int] | None, client: Client) -> None:
        """Both legs. Returns when the client has its whole answer; raises LegFailed or ClientGone."""
        handoff = None if run.plan.alone else self._handoff(run.plan.prefill.registration)
        prefill: asyncio.Task[None] | None = None
        if handoff is not None:
            self._ledger.expect(run.record, handoff.room, len(engine_rids(run.request, run.rid)))
            body = leg_body(run.request, run.rid, ids, handoff, keep_stream=False)
            prefill = asyncio.create_task(self._leg(run, self._prefill(run, body)))
        decode = asyncio.create_task(self._leg(run, self._decode(run, ids, handoff, client, prefill)))
        gone = asyncio.create_task(client.gone())
        tasks = {task for task in (prefill, decode, gone) if task is not None}
        ended_well = False
        try:
            await self._watch(run, prefill, decode, gone)
            ended_well = True
            if prefill is not None:
                # For its usage; what the client got does not depend on it any more.
                await asyncio.wait({prefill}, timeout=SETTLE_S)
        finally:
            if not ended_well:
                self._abort(run)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(
        self, run: _Run, prefill: asyncio.Task[None] | None, decode: asyncio.Task[None], gone: asyncio.Task[None]
    ) -> None:
        """Returns when decode has ended well, raises when anything that it needs has not."""
        waiting: set[asyncio.Future[None] | asyncio.Future[str]] = {decode, gone, run.lost}
        if prefill is not None:
            waiting.add(prefill)
        while True:
            left_s = max(0.0, run.deadline_s - self._clock_s())
            done, _ = await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if decode in done:
                return decode.result()
            if gone in done:
                raise ClientGone
            if not done:
                seconds = self._section.request_timeout_s
                raise LegFailed(run.plan.decode.name, Fault.TIMEOUT, f"not done within {seconds:g} s", 504)
            if prefill is not None and prefill in done:
                waiting.discard(prefill)
                if prefill.exception() is not None and run.record.ttft_s is None:
                    prefill.result()
            if run.lost in done:
                name = run.lost.result()
                raise LegFailed(name, Fault.LOST, f"{name} was lost")

    async def _leg(self, run: _Run, leg: Coroutine[None, None, None]) -> None:
        """One of the two, whose failure is its worker's also where the other one's ends the request."""
        try:
            await leg
        except LegFailed as failed:
            self._suspect(run, failed)
            raise

    async def _prefill(self, run: _Run, body: bytes) -> None:
        """The prefill leg: its 200 means that the pages were delivered."""
        worker = run.plan.prefill
        try:
            raw, _ = await self._whole(worker.registration, run.request.endpoint, body)
            seen = whole(raw)
            if seen.failure is not None:
                raise refused(worker.name, seen.failure.status, seen.failure.message)
        except BaseException:
            # Also where it is cancelled: its load is not there any more.
            self._placement.failed(run.flight, self._clock_s())
            raise
        run.prefilled = True
        self._note_usage(run, seen)
        self._placement.prefilled(run.flight, self._clock_s(), run.record.actual_cached_tokens)

    async def _decode(
        self,
        run: _Run,
        ids: list[int] | None,
        handoff: Handoff | None,
        client: Client,
        prefill: asyncio.Task[None] | None,
    ) -> None:
        """The decode leg: its answer goes to the client."""
        worker, limit_s = run.plan.decode, self._section.first_byte_timeout_s
        body = leg_body(run.request, run.rid, ids, handoff, keep_stream=True)
        if run.request.stream:
            await self._stream(run, client, body, limit_s)
            return
        late = f"{worker.name} sent nothing within {limit_s:g} s"
        answering = asyncio.create_task(self._whole(worker.registration, run.request.endpoint, body))
        try:
            if prefill is not None:
                # All of a whole answer's bytes come at its end, so until then prefill's answer is the sign of life.
                done, _ = await asyncio.wait({prefill, answering}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    raise LegFailed(worker.name, Fault.TIMEOUT, late, 504)
            raw, headers = await answering
        finally:
            answering.cancel()
        run.seen = whole(raw)
        _check(worker.name, run.seen)
        if handoff is None:
            self._note_usage(run, run.seen)
        await client.answer(200, raw, {**_content_type(headers), **run.headers})

    async def _stream(self, run: _Run, client: Client, body: bytes, limit_s: float) -> None:
        worker = run.plan.decode
        watch = StreamWatch()
        run.seen = watch.seen
        try:
            async with asyncio.timeout(limit_s):
                response = await self._open(worker.registration, run.request.endpoint, body)
                piece = await self._upstream.read(worker.name, response)
        except TimeoutError:
            raise LegFailed(
                worker.name, Fault.TIMEOUT, f"{worker.name} sent nothing within {limit_s:g} s", 504
            ) from None
        try:
            watch.feed(piece)
            if not piece or watch.seen.failure is not None:
                _check(worker.name, watch.end())
            run.record.ttft_s = self._clock_s() - run.record.started_s
            self._placement.prefilled(run.flight, self._clock_s())
            await client.start(200, {**_content_type(response.headers), "cache-control": "no-cache", **run.headers})
            while piece:
                await client.write(piece)
                if watch.seen.failure is not None:
                    break
                piece = await self._upstream.read(worker.name, response)
                watch.feed(piece)
            _check(worker.name, watch.end(), relayed=True)
            if run.plan.alone:
                self._note_usage(run, watch.seen)
            await client.end()
        finally:
            response.close()

    async def _whole(
        self, registration: Registration, endpoint: Endpoint, body: bytes
    ) -> tuple[bytes, Mapping[str, str]]:
        """An answer in one piece, and its headers."""
        response = await self._open(registration, endpoint, body)
        try:
            return await self._upstream.read_all(registration.worker, response), response.headers
        finally:
            # Also where it is cancelled: the worker sees a closed connection, even if no abort reaches it.
            response.close()

    async def _open(self, registration: Registration, endpoint: Endpoint, body: bytes) -> aiohttp.ClientResponse:
        return await self._upstream.open(registration.worker, registration.url + endpoint.value, body)

    def _note_usage(self, run: _Run, seen: Seen) -> None:
        """What the engine says it computed, and what it had."""
        if seen.usage is not None:
            run.record.actual_cached_tokens = seen.usage.cached_tokens
            run.record.prompt_tokens = seen.usage.prompt_tokens or run.record.prompt_tokens

    def _handoff(self, prefill: Registration) -> Handoff:
        return Handoff(
            host=prefill.handoff_host,
            port=prefill.handoff_port,
            room=self._rooms.randint(1, MAX_ROOM),
            epoch=prefill.epoch,
        )

    def _abort(self, run: _Run) -> None:
        """Tells both workers, without waiting."""
        rids = engine_rids(run.request, run.rid)
        for worker in {run.plan.prefill.name: run.plan.prefill, run.plan.decode.name: run.plan.decode}.values():
            self._spawn(self._upstream.abort(worker.name, worker.registration.url, rids))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _check(worker: str, seen: Seen, *, relayed: bool = False) -> None:
    """Raises LegFailed where an answer of status 200 is none.

    relayed  the client has seen all of it already
    """
    if seen.failure is not None:
        failed = refused(worker, seen.failure.status, seen.failure.message)
        failed.told = relayed and seen.failure.told
        raise failed
    if seen.empty:
        raise LegFailed(worker, Fault.BROKEN, f"{worker} ended its answer without a token")


def _content_type(headers: Mapping[str, str]) -> dict[str, str]:
    return {"content-type": headers.get("content-type", "application/json")}


def _as_api_error(failed: LegFailed) -> ApiError:
    if failed.client_to_blame:
        return ApiError(failed.status, failed.message)
    return ApiError(failed.status, failed.message, "server_error", code=f"worker_{failed.fault}")
