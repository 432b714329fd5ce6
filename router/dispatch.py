"""One client request from start to end.

    body ─> plan ─> attempt ─> the client has its answer
              ^        └ failed: again on another pair, on from its tokens, or the client is told (`lifecycle.after`)
              └────────────┘

Until the client has a first token, nothing is said to it, and a failure of either worker costs it time alone. After
that the stream goes on from the tokens that it has. That first token is prefill's, said while its pages are on their
way, where a stream could go on (`resume.forbids`). What cannot be mended is an HTTP error, or the last event of a
stream that has begun.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from router.admission import Admission
from router.answer import Seen
from router.attempt import Asked, Attempt, Expired, Moved
from router.avoid import Avoid
from router.client import Client, ClientGone
from router.config import RouterSection
from router.deadlines import Patience
from router.delivery import Delivery
from router.faults import BETWEEN, UNSEEN, Fault, LegFailed
from router.fleet import Fleet, Worker
from router.intake import Intake
from router.ledger import Ledger, Outcome, Record, Try
from router.lifecycle import Limits, Next, Situation, after
from router.openai import (
    MAX_ROOM,
    ApiError,
    ClientRequest,
    Endpoint,
    Handoff,
    engine_rids,
    read,
)
from router.placement import Flight, Placement
from router.planner import Plan, Planner, Prompt, render
from router.policy import NoWorker
from router.render import Renderer
from router.request_log import line
from router.resume import forbids, hinders, remaining, stop_strings
from router.retry_budget import RetryBudget
from router.trace_context import TraceContext
from router.upstream import Upstream
from router.usual_times import UsualTimes
from transfer.wire import Registration

log = logging.getLogger(__name__)

RENDER_INLINE_BYTES = 32 * 1024
"""A longer body is rendered on a thread, so that other streams go on."""
LONG_BYTES = 16 * 1024
"""A body that takes some tenths of a millisecond to read."""
LOOK_S = 0.1
"""How often a request that waits for a worker looks for one."""
DECODE_AFTER, DECODE_AFTER_MOST_S = 0.2, 0.03
"""Decode is asked when so much of the time is over in which prefill computes without it, at most: what it does to take
a request in, and prefill to hear where its pages shall go, would keep prefill from beginning."""
TAIL_TOKENS = 64
"""Of a stream that was cut off, so many of the last tokens are searched for the beginning of a stop string."""

TOKEN_S = 0.25
"""What a token of an answer takes, at most, before any was seen."""
ANSWER_MARGIN = 4.0
"""A whole answer may take so many times as long as usual: others slow it down, and nothing is told before its end."""
LEARN_TOKENS = 8
"""A shorter answer is mostly waiting: how long a token takes is not learned from it."""


@dataclass(slots=True)
class _Run:
    """A request that was sent to workers, and is not over."""

    rid: str
    request: ClientRequest
    prompt: Prompt
    delivery: Delivery
    record: Record
    gone: asyncio.Future[None]
    ends_at_s: float
    """When its own time is over."""
    avoid: Avoid
    trace: TraceContext
    attempt: Attempt | None = None
    decoding_since_s: float | None = None
    """When decode's first token of the last attempt came."""


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
        admission: Admission,
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
        self._admission = admission
        self._placement = placement
        self._renderer = renderer
        self._upstream = upstream
        self._ledger = ledger
        self._on_end = on_end
        self._clock_s = clock_s
        self._wall_s = wall_s
        self._rooms = rooms or random.SystemRandom()
        self._runs: dict[str, _Run] = {}
        self._intake = Intake()
        self._limits = Limits(section.retries, section.resumes)
        self._budget = RetryBudget(section.retry_fraction, section.retry_burst)
        self._handoffs = UsualTimes(section.handoff_floor_s, section.first_byte_timeout_s)
        self._answers = UsualTimes(
            section.stall_timeout_s, section.request_timeout_s, first=TOKEN_S, margin=ANSWER_MARGIN
        )

    def worker_lost(self, worker: Worker, why: str = "was lost") -> None:
        """Ends the attempts that still need this worker, and forgets how long it usually takes."""
        self._handoffs.forget(worker.name)
        self._answers.forget(worker.name)
        for attempt in self._attempts():
            attempt.lose(worker, why)

    def move(self, worker: Worker) -> None:
        """Requests that this worker has shall go on elsewhere, where they can, and where there is anybody else."""
        if not self._fleet.any_pair():
            return
        for run in self._runs.values():
            attempt = run.attempt
            if attempt is not None and attempt.needs(worker) and not self._hindrance(run, attempt):
                attempt.move()

    def _attempts(self) -> Iterable[Attempt]:
        return [run.attempt for run in self._runs.values() if run.attempt is not None]

    async def serve(self, endpoint: Endpoint, client: Client, tenant: str = "") -> None:
        """Answers one request of this tenant. Does not raise for what clients or workers do."""
        rid = uuid.uuid4().hex
        delivery = Delivery(client, {"x-request-id": rid})
        try:
            raw = await client.body()
            gone = asyncio.create_task(client.gone())
            try:
                await self._serve(rid, endpoint, raw, client, tenant, delivery, gone)
            finally:
                gone.cancel()
                await asyncio.gather(gone, return_exceptions=True)
        except ClientGone:
            return
        except ApiError as error:
            if not await delivery.fail(error):
                log.info("client does not read rid=%s", rid)

    async def _serve(
        self,
        rid: str,
        endpoint: Endpoint,
        raw: bytes,
        client: Client,
        tenant: str,
        delivery: Delivery,
        gone: asyncio.Future[None],
    ) -> None:
        came_s = self._clock_s()
        ends_at_s = came_s + self._section.request_timeout_s
        try:
            request = await self._read(endpoint, raw, may_resume=client.header("x-mainstem-resume") != "never")
            prompt = await self._render(request)
            until_s = self._waits_until_s(ends_at_s)
            plan = await self._admission.plan(request, prompt, tenant or request.salt, gone, until_s)
        except ApiError:
            self._ledger.refused(self._wall_s())
            raise
        self._budget.request()
        record = Record(
            id=rid,
            at_s=self._wall_s(),
            started_s=self._clock_s(),
            endpoint=request.endpoint.value,
            stream=request.stream,
            decision=plan.decision,
            unrendered=prompt.unrendered,
            prompt_tokens=prompt.tokens,
        )
        trace = TraceContext.of(client.header("traceparent"), rid)
        record.tenant, record.queued_s = tenant, self._clock_s() - came_s
        run = _Run(rid, request, prompt, delivery, record, gone, ends_at_s, Avoid(), trace)
        self._runs[rid] = run
        self._ledger.begin(record)
        outcome, error = Outcome.CANCELLED, None
        try:
            error = await self._run(run, plan)
            outcome = Outcome.OK if error is None else Outcome.ERROR
        finally:
            # Also where the client left, or the task itself is cancelled, at shutdown.
            del self._runs[rid]
            self._account(run, outcome)
        if error is not None:
            # Only now: a client that does not read would hold the workers' load.
            raise error

    async def _read(self, endpoint: Endpoint, raw: bytes, *, may_resume: bool) -> ClientRequest:
        """Raises ApiError."""
        await self._intake.turn()
        request = read(endpoint, raw, self._model, may_resume=may_resume)
        if len(raw) > LONG_BYTES:
            # Hashing it takes as long again: what other streams have to say is passed on in between.
            await asyncio.sleep(0)
        return request

    async def _render(self, request: ClientRequest) -> Prompt:
        if len(request.raw) <= RENDER_INLINE_BYTES or isinstance(request.body.get("prompt"), list):
            return render(self._renderer, request)
        return await asyncio.to_thread(render, self._renderer, request)

    async def _run(self, run: _Run, plan: Plan) -> ApiError | None:
        """Attempts, until one of them is the last. The error that the client has to be told. Raises ClientGone."""
        while True:
            run.record.decision = plan.decision
            try:
                await self._attempt(run, plan)
                return None
            except Expired:
                seconds = self._section.request_timeout_s
                run.record.error = f"{plan.decode.name}: {Fault.TIMEOUT}"
                return ApiError(504, f"not done within {seconds:g} s", "server_error", code="request_timeout")
            except (LegFailed, Moved) as ended:
                failed = ended
            next_step, why = self._after(run, failed)
            last = run.record.tries[-1]
            last.then = next_step if next_step is not Next.TELL else why
            if next_step is Next.TELL:
                return _as_api_error(failed)
            if next_step is Next.RESUME:
                assert run.attempt is not None, "something was tried"
                run.delivery.ids += run.attempt.delivered_ids
            try:
                plan = await self._place_again(run)
            except ApiError as nowhere:
                last.then = nowhere.message
                return _as_api_error(failed) if isinstance(failed, LegFailed) else nowhere
            if isinstance(failed, LegFailed):
                self._budget.take()

    async def _place_again(self, run: _Run) -> Plan:
        """A pair for what is left of the request. Raises ApiError, ClientGone."""
        generated = run.delivery.ids
        request, prompt = run.request, run.prompt
        if generated:
            assert prompt.ids is not None, "only what was tokenized here goes on elsewhere"
            limit = request.max_new_tokens
            request = replace(request, max_new_tokens=None if limit is None else limit - len(generated))
            prompt = Prompt([*prompt.ids, *generated], len(prompt.ids) + len(generated))
        return await self._place(request, prompt, run.avoid, run.gone, self._waits_until_s(run.ends_at_s))

    def _waits_until_s(self, ends_at_s: float) -> float:
        return min(ends_at_s, self._clock_s() + self._section.queue_timeout_s)

    async def _place(
        self, request: ClientRequest, prompt: Prompt, avoid: Avoid, gone: asyncio.Future[None], until_s: float
    ) -> Plan:
        """A pair that this request may go to, as soon as there is one. Raises ApiError, ClientGone."""
        while True:
            try:
                return self._planner.plan(request, prompt, self._clock_s(), avoid, only_with_room=False)
            except NoWorker as error:
                if not self._fleet.may_come(self._clock_s()) or self._clock_s() >= until_s:
                    raise ApiError(503, str(error), "service_unavailable", code="no_worker", retry_after_s=1) from None
            await asyncio.wait({gone}, timeout=LOOK_S)
            if gone.done():
                raise ClientGone

    async def _attempt(self, run: _Run, plan: Plan) -> None:
        """One pair's try. Raises LegFailed, Moved, Expired, ClientGone."""
        record, request, number = run.record, plan.request, len(run.record.tries)
        decision = plan.decision
        run.delivery.headers |= {
            "x-mainstem-prefill": decision.prefill,
            "x-mainstem-decode": decision.decode,
            "x-mainstem-matched-tokens": str(decision.matched_tokens),
            "x-mainstem-mode": record.mode,
        }
        # Of one length for all, as SGLang's abort takes whatever begins with what it is given.
        rid = f"{run.rid}{number:02x}"
        handoff = None if plan.alone else self._handoff(plan.prefill.registration)
        started_s = self._clock_s()
        flight = self._placement.send(decision, plan.pages, started_s, self._planner.new_tokens(request))
        self._admission.changed()
        expected_s = decision.expected_s
        trial = Try(plan.prefill.name, plan.decode.name)
        record.tries.append(trial)
        if handoff is not None:
            self._ledger.expect(record, handoff.room, len(engine_rids(request, rid)))

        def prefilled(seen: Seen) -> None:
            now_s = self._clock_s()
            if seen.usage is not None and not run.delivery.ids:
                record.actual_cached_tokens = seen.usage.cached_tokens
                record.prompt_tokens = seen.usage.prompt_tokens or record.prompt_tokens
            self._placement.prefilled(flight, now_s, None if seen.usage is None else seen.usage.cached_tokens)
            if not decision.pairs.ask.guessed:
                self._handoffs.learn(expected_s, now_s - started_s, plan.prefill.name, plan.decode.name)
            plan.prefill.health.went_well()
            self._admission.changed()

        def computed(at_s: float, cached_tokens: int | None) -> None:
            self._placement.prefilled(flight, at_s, cached_tokens)
            self._admission.changed()

        def token(by: Worker, cached_tokens: int | None) -> None:
            now_s = self._clock_s()
            if record.ttft_s is None and request.stream:
                record.ttft_s = now_s - record.started_s
                record.first_token_from = "decode" if by is plan.decode else "prefill"
            if request.stream:
                # Behind what is about to be written: to learn of it takes longer.
                asyncio.get_running_loop().call_soon(computed, now_s, cached_tokens)
            if by is plan.decode:
                # Prefill has done well when its pages are there.
                run.decoding_since_s = now_s
                by.health.went_well()

        asked = Asked(
            rid=rid,
            request=request,
            ids=plan.prompt.ids,
            handoff=handoff,
            more=remaining(run.request, len(run.delivery.ids)) if run.delivery.ids else {},
            trace=run.trace.parent(rid),
            early=self._early(run, plan),
            decode_after_s=_decode_after_s(plan),
        )
        attempt = Attempt(
            plan,
            asked,
            run.delivery,
            self._upstream,
            self._patience(run, plan, expected_s),
            prefilled=prefilled,
            prefill_failed=lambda: self._placement.failed(flight, self._clock_s()),
            token=token,
            stall_s=self._section.stall_timeout_s,
        )
        run.attempt, run.decoding_since_s = attempt, None
        well = False
        try:
            await attempt.run(run.gone)
            well = True
        except LegFailed as failed:
            trial.failed = f"{failed.worker}: {failed.fault}"
            trial.unseen = failed.fault in UNSEEN
            self._blame(run, plan, failed)
            raise
        except Moved:
            trial.failed = "moved"
            raise
        except Expired:
            trial.failed = "out of time"
            raise
        finally:
            trial.decoded = run.decoding_since_s is not None
            self._settle(run, attempt, flight, well)

    def _early(self, run: _Run, plan: Plan) -> bool:
        """Whether prefill says the first token: where the stream could go on elsewhere, should the hand-off fail."""
        return (
            self._section.first_token_from == "prefill"
            and self._limits.resumes > 0
            and not plan.alone
            and run.prompt.ids is not None
            and run.request.max_new_tokens != 1
            and not run.delivery.begun
            and not forbids(run.request)
        )

    def _patience(self, run: _Run, plan: Plan, expected_s: float) -> Patience:
        section = self._section
        delivered_s = None
        if not plan.alone and not plan.decision.pairs.ask.guessed:
            delivered_s = self._handoffs.limit_s(expected_s, plan.prefill.name, plan.decode.name)
        first_byte_s: float | None = section.first_byte_timeout_s
        whole_s = None
        if not run.request.stream:
            # All of a whole answer's bytes come at its end: prefill's answer is the sign of life, where there is one.
            whole_s = self._answers.limit_s(_answer_tokens(plan), plan.decode.name)
            if plan.alone:
                whole_s += section.first_byte_timeout_s
            else:
                delivered_s = min(delivered_s or section.first_byte_timeout_s, section.first_byte_timeout_s)
            first_byte_s = None
        return Patience(
            self._clock_s,
            request_at_s=run.ends_at_s,
            delivered_s=delivered_s,
            first_byte_s=first_byte_s,
            whole_s=whole_s,
        )

    def _blame(self, run: _Run, plan: Plan, failed: LegFailed) -> None:
        """Who is not asked again by this request, and who is looked at before others ask."""
        now_s = self._clock_s()
        if failed.client_to_blame:
            return
        if failed.fault in BETWEEN:
            run.avoid.pairs.add((plan.prefill, plan.decode))
            if failed.status == 504:
                self._handoffs.ran_out(plan.prefill.name, plan.decode.name)
            if failed.status == 504 or failed.fault is Fault.APART:
                # One of the two may be gone, or cut off from here: a probe of each says which.
                plan.prefill.health.failed(now_s)
                plan.decode.health.failed(now_s)
            return
        worker = plan.prefill if failed.worker == plan.prefill.name else plan.decode
        run.avoid.workers.add(worker)
        if failed.fault is not Fault.LOST:
            worker.health.failed(now_s)
        if failed.fault is Fault.TIMEOUT and not run.request.stream:
            self._answers.ran_out(worker.name)

    def _after(self, run: _Run, failed: LegFailed | Moved) -> tuple[Next, str]:
        assert run.attempt is not None
        situation = Situation(
            client_to_blame=isinstance(failed, LegFailed) and failed.client_to_blame,
            moved=isinstance(failed, Moved),
            begun=run.delivery.begun,
            hindrance=self._hindrance(run, run.attempt),
            # Of which nobody has seen anything: that is bounded by how many pairs there are.
            # A stream that goes on behind prefill's token alone is tried again, as far as its workers are concerned.
            retries=sum(bool(one.then) and not one.decoded and not one.unseen for one in run.record.tries),
            resumes=sum(one.then == Next.RESUME and one.decoded for one in run.record.tries),
            decoded=run.decoding_since_s is not None,
        )
        if isinstance(failed, LegFailed) and failed.fault is Fault.UNTRUE and situation.begun:
            # Nobody knows what the client has.
            situation = replace(situation, hindrance="untrue")
        return after(situation, self._limits, self._budget.left())

    def _hindrance(self, run: _Run, attempt: Attempt) -> str:
        """Why this request could not go on elsewhere, once begun; "" where it could."""
        if not run.delivery.begun:
            return ""
        if why := forbids(run.request):
            return why
        if run.prompt.ids is None:
            return "not rendered"
        if attempt.stream is None:
            return "not a stream"
        stops = stop_strings(run.request)
        ids = [*run.delivery.ids, *attempt.delivered_ids]
        if run.request.max_new_tokens is not None and len(ids) >= run.request.max_new_tokens:
            return "at its end"
        tail = self._renderer.text(ids[-TAIL_TOKENS:]) if stops else ""
        return hinders(attempt.stream, stops, tail)

    def _settle(self, run: _Run, attempt: Attempt, flight: Flight, well: bool) -> None:
        """Takes an attempt's load off its workers, and what it says of them in."""
        record, seen, now_s = run.record, attempt.seen, self._clock_s()
        before = len(run.delivery.ids)
        part = seen.usage.completion_tokens if seen.usage is not None else seen.token_events
        # A token that prefill said may be all that there is.
        part = max(part, len(attempt.delivered_ids))
        record.generated_tokens = before + part
        if well and part >= LEARN_TOKENS:
            self._answers.learn(part, attempt.patience.decoding_s, attempt.plan.decode.name)
        if attempt.plan.alone and seen.usage is not None and not before:
            record.actual_cached_tokens = seen.usage.cached_tokens
        # How fast an answer came that was cut short says nothing of the worker.
        itl_s = None
        if well and run.request.stream and run.decoding_since_s is not None and part > 1 and not before:
            # From decode's first token, as prefill's comes before the hand-off.
            itl_s = (now_s - run.decoding_since_s) / (part - 1)
        self._placement.ended(flight, now_s, itl_s, part)
        self._admission.changed()

    def _account(self, run: _Run, outcome: Outcome) -> None:
        record, now_s = run.record, self._clock_s()
        failed = next((one.failed for one in reversed(record.tries) if one.failed), None)
        error = (record.error or failed) if outcome is Outcome.ERROR else None
        self._ledger.end(record, outcome, now_s=self._wall_s(), steady_s=now_s, error=error)
        log.log(logging.WARNING if error else logging.INFO, "request %s trace=%s", line(record), run.trace.trace)
        self._on_end(record)

    def _handoff(self, prefill: Registration) -> Handoff:
        return Handoff(
            host=prefill.handoff_host,
            port=prefill.handoff_port,
            room=self._rooms.randint(1, MAX_ROOM),
            epoch=prefill.epoch,
        )


def _decode_after_s(plan: Plan) -> float:
    """How long after prefill decode is asked. Where prefill does not begin before decode has granted pages, at once."""
    decision = plan.decision
    if decision.pairs.ask.guessed:
        return 0.0
    share = min(1.0, plan.prefill.registration.ungranted_tokens / max(1, decision.uncached_tokens))
    return min(DECODE_AFTER * share * decision.expected_s, DECODE_AFTER_MOST_S)


def _answer_tokens(plan: Plan) -> int:
    """As many as this pair may be asked to make, of all prompts."""
    fit = plan.decode.registration.max_context_tokens - plan.prompt.tokens
    return (plan.request.max_new_tokens or max(1, fit)) * len(engine_rids(plan.request, ""))


def _as_api_error(failed: LegFailed | Moved) -> ApiError:
    if isinstance(failed, Moved):
        # It could have gone on elsewhere when it was asked to, and a moment later it could not.
        return ApiError(503, "the worker is taken out of service", "server_error", code="worker_drained")
    if failed.client_to_blame:
        return ApiError(failed.status, failed.message)
    fields: dict[str, Any] = {"code": f"worker_{failed.fault}"}
    if failed.status == 503:
        fields["retry_after_s"] = 1
    return ApiError(failed.status, failed.message, "server_error", **fields)
