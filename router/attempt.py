"""One pair's try at a request: both legs, until the client has its answer or the pair has failed.

                   ┌ first token ─┐
    prefill leg ───┴── its end: the pages were delivered ──┐
                                  │                        ├──> lifecycle.step ──> DONE, FAILED, ENDED
    decode leg ─── tokens ─> Delivery ─> client ───────────┘
    worker lost or moved, deadlines, client gone ──────────^

Whatever ends it early ends both legs: an abort to both workers, at once and without waiting for them, and closed
connections.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from router.answer import Seen, whole
from router.client import ClientGone
from router.deadlines import Patience
from router.delivery import Delivery
from router.faults import BETWEEN, Fault, LegFailed, refused
from router.first_token import STREAM_OPTIONS, FirstToken, Said, wants_usage
from router.fleet import Worker
from router.lifecycle import LIVE, Event, Phase, step
from router.openai import ClientRequest, Handoff, engine_rids, leg_body
from router.planner import Plan
from router.silence import Silence
from router.token_stream import TokenStream
from router.truth import untrue
from router.upstream import Upstream

DONE = b"data: [DONE]\n\n"
"""A stream's last word, said for a worker that broke off just before it."""
LAST_S = 0.5
"""How long a worker may take to end its answer after its last word."""
BLAME_S = 0.05
"""A hand-off that failed is told by both workers. How long the other one is listened to: it may be gone altogether."""
SPARE_TOKENS = 4
"""Of its context, beside a page, that an engine keeps to itself."""
SETTLE_S = 2.0
"""How long prefill's usage is waited for, after the client has its answer."""


class Expired(Exception):
    """The request's own time is over."""


class Moved(Exception):
    """The worker that decodes wants to be rid of it. Nothing has failed."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What the pair is asked.

    rid      by which the workers know it; of one length for all requests
    ids      tokens of the prompt, and of the answer so far; None: the engine renders it itself
    more     fields of this attempt alone
    trace    its `traceparent`
    early    the client's first token is prefill's to say
    decode_after_s  so much later than prefill is decode asked, unless prefill says something before
    """

    rid: str
    request: ClientRequest
    ids: list[int] | None
    handoff: Handoff | None
    more: Mapping[str, Any] = field(default_factory=dict)
    trace: str = ""
    early: bool = False
    decode_after_s: float = 0.0


class Attempt:
    """Made, and run once.

    prefilled       told when the pages were delivered, with what prefill says it used
    prefill_failed  told when they were not, or nobody listens any more
    token           told when a worker says the first token: which, and what its cache had of the prompt, where that is
                    known. Of prefill, where that was the client's first; of decode, always
    stall_s         a stream that has begun and then says nothing for so long has failed
    """

    def __init__(
        self,
        plan: Plan,
        asked: Asked,
        delivery: Delivery,
        upstream: Upstream,
        patience: Patience,
        *,
        prefilled: Callable[[Seen], None],
        prefill_failed: Callable[[], None],
        token: Callable[[Worker, int | None], None],
        stall_s: float,
    ) -> None:
        self.plan = plan
        self.phase = Phase.SENT
        self.stream = TokenStream(delivery.continuation(asked.rid)) if asked.request.stream else None
        """What passes of decode's answer, where it is one."""
        self.delivered_ids: list[int] = []
        """Tokens of the text that the client was sent."""
        self._prefill_spoke = asyncio.Event()
        """Set when it has said a token, or all: decode is asked at once then, if it was not."""
        self._writing = asyncio.Lock()
        """Held by the leg whose piece is on its way to the client."""
        self.seen = Seen() if self.stream is None else self.stream.seen
        """What decode's answer says of itself."""
        self._asked = asked
        self._delivery = delivery
        self._upstream = upstream
        self.patience = patience
        self._on_prefilled = prefilled
        self._on_prefill_failed = prefill_failed
        self._on_token = token
        self._stall_s = stall_s
        self._interrupted: asyncio.Future[LegFailed | Moved] = asyncio.get_running_loop().create_future()

    def needs(self, worker: Worker) -> bool:
        """Decode's worker is needed to the end, prefill's until it has delivered."""
        if worker is self.plan.decode:
            return self.phase in LIVE
        return worker is self.plan.prefill and self.phase is Phase.SENT

    def lose(self, worker: Worker, why: str) -> None:
        """The worker is gone, or does not move."""
        if self.needs(worker) and not self._ending and not self._interrupted.done():
            self._interrupted.set_result(LegFailed(worker.name, Fault.LOST, f"{worker.name} {why}"))

    def move(self) -> None:
        """The request shall go on elsewhere."""
        if self.phase in LIVE and not self._ending and not self._interrupted.done():
            self._interrupted.set_result(Moved())

    @property
    def _ending(self) -> bool:
        """Whether the client has all of its text, and why it ended: there is nothing left to go on with."""
        return self.stream is not None and self.stream.seen.finish_reason is not None

    async def run(self, gone: asyncio.Future[None]) -> None:
        """Returns when the client has its whole answer. Raises LegFailed, Moved, Expired, ClientGone.

        gone  resolved when the client has closed its connection
        """
        prefill = None if self.plan.alone else asyncio.create_task(self._prefill())
        decode = asyncio.create_task(self._decode())
        tasks = {task for task in (prefill, decode) if task is not None}
        try:
            await self._watch(prefill, decode, gone)
            if prefill is not None:
                # For its usage; what the client got does not depend on it any more.
                await asyncio.wait({prefill}, timeout=SETTLE_S)
        finally:
            if self.phase is not Phase.DONE:
                self._abort()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _happened(self, event: Event) -> None:
        if event is Event.PREFILLED:
            self.patience.delivered()
        self.phase = step(self.phase, event)

    async def _watch(
        self, prefill: asyncio.Task[None] | None, decode: asyncio.Task[None], gone: asyncio.Future[None]
    ) -> None:
        """Follows both legs to the end of the attempt."""
        waiting: set[asyncio.Future[Any]] = {decode, gone, self._interrupted}
        if prefill is not None:
            waiting.add(prefill)
        while True:
            done, _ = await asyncio.wait(
                waiting, timeout=self.patience.left_s(self.phase), return_when=asyncio.FIRST_COMPLETED
            )
            if decode in done:
                failed = decode.exception()
                self._happened(Event.ANSWERED if failed is None else Event.DECODE_FAILED)
                if failed is not None:
                    raise await self._blamed(failed, prefill)
                return
            if gone in done:
                self._happened(Event.GONE)
                if self.phase is Phase.DONE:
                    return
                raise ClientGone
            if self._interrupted in done:
                interrupted = self._interrupted.result()
                self._happened(Event.MOVED if isinstance(interrupted, Moved) else Event.DECODE_FAILED)
                raise interrupted
            if prefill is not None and prefill in done:
                waiting.discard(prefill)
                failed = prefill.exception()
                self._happened(Event.PREFILLED if failed is None else Event.PREFILL_FAILED)
                if failed is not None and (self.phase is Phase.FAILED or _is_untrue(failed)):
                    self.phase = Phase.FAILED
                    blamed = await self._blamed(failed, decode)
                    if decode.done() and not decode.cancelled() and decode.exception() is None:
                        # It had what it needed, and the client has its answer.
                        self.phase = Phase.DONE
                        return
                    raise blamed
            if not done and not self.patience.left_s(self.phase):
                # Else the phase has changed meanwhile, and with it what is waited for.
                self._late()

    def _late(self) -> None:
        """Nothing happened in the time that this phase has. Raises what that means."""
        if self.patience.expired:
            self._happened(Event.EXPIRED)
            raise Expired
        late = self.patience.late(self.phase, self.plan.prefill.name, self.plan.decode.name)
        self._happened(Event.DECODE_FAILED)
        raise late

    async def _blamed(self, failed: BaseException, other: asyncio.Task[None] | None) -> BaseException:
        """The failure that the whole attempt is put down to: where one leg says that the hand-off failed, perhaps the
        other one knows better, as its worker is gone."""
        if not isinstance(failed, LegFailed) or failed.fault not in BETWEEN or other is None:
            return failed
        await asyncio.wait({other}, timeout=BLAME_S)
        if other.done() and not other.cancelled():
            known = other.exception()
            if isinstance(known, LegFailed) and known.fault not in BETWEEN:
                return known
        return failed

    async def _prefill(self) -> None:
        """The prefill leg: that it ends well means that the pages were delivered."""
        worker = self.plan.prefill
        try:
            if self.stream is not None and self._asked.early:
                seen = await self._opened(worker, self.stream)
            else:
                raw, _ = await self._whole(worker, self._body(keep_stream=False))
                seen = whole(raw)
            if seen.failure is not None:
                raise refused(worker.name, seen.failure)
            # Of the one token that it makes, nothing is said; of the prompt, all.
            if wrong := untrue(seen.usage, self._asked.ids):
                raise LegFailed(worker.name, Fault.UNTRUE, f"{worker.name} {wrong}")
        except BaseException:
            # Also where it is cancelled: its load is not there any more.
            self._on_prefill_failed()
            raise
        self._prefill_spoke.set()
        self._on_prefilled(seen)

    async def _opened(self, worker: Worker, decodes: TokenStream) -> Seen:
        """Prefill's answer as a stream, whose first token goes to the client unless decode was sooner."""
        first = FirstToken(self._asked.ids or [], wants_usage(self._asked.request.body))
        response = await self._open(worker, self._body(keep_stream=True, stream_options=STREAM_OPTIONS))
        try:
            while not first.stream.done and (piece := await self._upstream.read(worker.name, response)):
                if (said := first.feed(piece)) is not None:
                    await self._open_with(said, decodes, response.headers)
            if first.stream.seen.finish_reason is None and first.stream.seen.failure is None:
                raise LegFailed(worker.name, Fault.BROKEN, f"{worker.name} ended its answer before its end")
            await self._to_its_end(worker, response)
        finally:
            response.close()
        return first.stream.seen

    async def _open_with(self, said: Said, decodes: TokenStream, headers: Mapping[str, str]) -> None:
        async with self._writing:
            if decodes.begun:
                return
            decodes.told(said.token, said.text)
            self._prefill_spoke.set()
            self._on_token(self.plan.prefill, said.cached_tokens)
            await self._delivery.write(said.events, headers)
            self.delivered_ids.append(said.token)

    async def _decode(self) -> None:
        """The decode leg: its answer goes to the client."""
        if not self.plan.alone:
            # Not before prefill's request is written, in the next turn of the event loop: that is what is waited for.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._asked.decode_after_s):
                    await self._prefill_spoke.wait()
        body = self._body(keep_stream=True)
        if self.stream is not None:
            await self._relay(self.stream, body)
            return
        worker = self.plan.decode
        raw, headers = await self._whole(worker, body)
        self.seen = whole(raw)
        self._check(self.seen)
        self._token()
        await self._delivery.answer(raw, headers)

    async def _relay(self, stream: TokenStream, body: bytes) -> None:
        response = await self._open(self.plan.decode, body)
        try:
            await self._pass_on(stream, response)
            passing = stream.end()
            self._check(stream.seen)
            self._token()
            await self._delivery.end(passing if stream.done else passing + DONE, response.headers)
            # A client that has read the last word may close at once: that is no loss.
            self._happened(Event.ANSWERED)
            await self._to_its_end(self.plan.decode, response)
        finally:
            response.close()

    async def _pass_on(self, stream: TokenStream, response: aiohttp.ClientResponse) -> None:
        """All that comes of decode's answer, until it is over. Raises LegFailed."""
        try:
            async with Silence(self._stall_s) as silence:
                while piece := await self._next(stream, response, silence):
                    await self._pass(stream, piece, response.headers)
                    if stream.done or stream.seen.failure is not None:
                        return
        except TimeoutError:
            if not stream.said_all:
                worker = self.plan.decode.name
                raise LegFailed(worker, Fault.TIMEOUT, f"{worker} sent nothing for {self._stall_s:g} s", 504) from None

    async def _pass(self, stream: TokenStream, piece: bytes, headers: Mapping[str, str]) -> None:
        async with self._writing:
            passing = stream.feed(piece)
            if stream.seen.failure is not None:
                return
            if stream.begun:
                self._token()
            if passing:
                passed = stream.ids[len(self.delivered_ids) :]
                # A client that reads slowly makes this wait; where it is given up meanwhile, nothing was sent.
                await self._delivery.write(passing, headers)
                self.delivered_ids += passed

    async def _to_its_end(self, worker: Worker, response: aiohttp.ClientResponse) -> None:
        """Behind an answer's last word: so that the connection can be used again."""
        with contextlib.suppress(TimeoutError, LegFailed):
            async with asyncio.timeout(LAST_S):
                await self._upstream.read_all(worker.name, response)

    async def _next(self, stream: TokenStream, response: aiohttp.ClientResponse, silence: Silence) -> bytes:
        """The next bytes of a stream; b"" at its end, or where only the words that say so are missing."""
        if self.phase is Phase.STREAMING:
            silence.waits()
        try:
            return await self._upstream.read(self.plan.decode.name, response)
        except LegFailed:
            if stream.said_all:
                return b""
            raise
        finally:
            silence.heard()

    def _token(self) -> None:
        if self.phase is not Phase.STREAMING:
            self._happened(Event.TOKEN)
            self._on_token(self.plan.decode, None)

    def _check(self, seen: Seen) -> None:
        """Raises LegFailed where an answer of status 200 is none."""
        worker = self.plan.decode.name
        if seen.failure is not None:
            raise refused(worker, seen.failure)
        if seen.empty:
            raise LegFailed(worker, Fault.BROKEN, f"{worker} ended its answer without a token")
        if seen.finish_reason is None:
            raise LegFailed(worker, Fault.BROKEN, f"{worker} ended its answer before its end")
        # Of a batch, the engine tells the sums of all prompts; of what it rendered itself, nothing is known to compare.
        ids, registration = self._asked.ids, self.plan.decode.registration
        wanted = None if ids is None else self._asked.request.max_new_tokens
        spare = registration.page_tokens + SPARE_TOKENS
        sure = None if ids is None else max(0, registration.max_context_tokens - len(ids) - spare)
        if wrong := untrue(seen.usage, ids, seen.finish_reason, wanted, sure):
            raise LegFailed(worker, Fault.UNTRUE, f"{worker} {wrong}")

    def _body(self, *, keep_stream: bool, **more: Any) -> bytes:
        asked = self._asked
        fields = {**asked.more, **more}
        return leg_body(asked.request, asked.rid, asked.ids, asked.handoff, fields, keep_stream=keep_stream)

    async def _whole(self, worker: Worker, body: bytes) -> tuple[bytes, Mapping[str, str]]:
        """An answer in one piece, and its headers."""
        response = await self._open(worker, body)
        try:
            return await self._upstream.read_all(worker.name, response), response.headers
        finally:
            # Also where it is cancelled: the worker sees a closed connection, even if no abort reaches it.
            response.close()

    async def _open(self, worker: Worker, body: bytes) -> aiohttp.ClientResponse:
        url = worker.registration.url + self._asked.request.endpoint.value
        return await self._upstream.open(worker.name, url, body, self._asked.trace)

    def _abort(self) -> None:
        """Tells both workers, without waiting."""
        rids = engine_rids(self._asked.request, self._asked.rid)
        for worker in {id(worker): worker for worker in (self.plan.prefill, self.plan.decode)}.values():
            self._upstream.abort_soon(worker.name, worker.registration.url, rids)


def _is_untrue(failed: BaseException) -> bool:
    return isinstance(failed, LegFailed) and failed.fault is Fault.UNTRUE
