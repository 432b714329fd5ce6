"""A simulated worker: the network face of a prefill or decode worker, with a prefix cache and no model.

It answers the two OpenAI endpoints, registers itself, publishes page events and answers
questions about them, over real sockets and with the cluster's key. Its text counts its
tokens, and goes on where a prompt ends with tokens of its own; its cached tokens are true
of the cache it keeps. It can be told to fail in the ways in which engines fail. For
tests and for trying the router without an engine.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import aiohttp
import msgspec
import zmq
import zmq.asyncio
from aiohttp import web

from transfer import wire
from transfer.auth import SIGNATURE_HEADER, ClusterKey
from transfer.ended import Ended
from transfer.pages import chain_ids, namespace, root_id
from transfer.wire import (
    Audit,
    Batch,
    CaughtUp,
    Cleared,
    HandoffTotals,
    PageEvent,
    PageMessage,
    Registration,
    Removed,
    Role,
    Snapshot,
    Stored,
    WorkerState,
    decode_page_request,
    encode,
    parse_bound_host,
)

FIRST_TOKEN = 1_000_000
"""Its own tokens count from here: no tokenizer of a test has as many."""
PAGE_BYTES = 1024
"""What a page of KV is said to take."""
_HOST = "127.0.0.1"
NOT_HANDED_OVER = "Prefill transfer failed for request rank=0: HandoffFailed(simulated)"
DEADLINE_S = 30.0
"""A hand-off or a hang that nobody ends is ended by then."""


class Fault(StrEnum):
    """How the next requests go wrong."""

    NONE = "none"
    ERROR = "error"
    """HTTP 500."""
    BAD_REQUEST = "bad_request"
    """HTTP 400, in the engine's flat shape."""
    HANG = "hang"
    """No answer until aborted."""
    DROP = "drop"
    """The connection is closed without an answer."""
    EMPTY = "empty"
    """HTTP 200 and nothing in it."""
    ERROR_EVENT_FIRST = "error_event_first"
    """HTTP 200, and the first event of the stream is an error."""
    ERROR_EVENT = "error_event"
    """An error event after some tokens."""
    ABORTED = "aborted"
    """A stream that ends with finish_reason "abort"."""
    DIE_MIDSTREAM = "die_midstream"
    """The connection is closed after some tokens."""
    OTHER_PROMPT = "other_prompt"
    """It says that it computed a prompt of one token more."""
    SHORT = "short"
    """It ends one token before what was asked for, and says that this is all."""
    HANDOFF = "handoff"
    """HTTP 500, as an engine says that a hand-off failed; in a stream, an error event behind the first token."""
    APART = "apart"
    """HTTP 500, as a decode worker says that it has no connection to the prefill worker."""
    STALL = "stall"
    """No more of the answer after its beginning, until aborted."""


@dataclass(slots=True)
class FaultsLeft:
    count: int


class Handoffs:
    """Stands for the transfer between the workers of one process: which rooms were delivered, and who listens."""

    def __init__(self) -> None:
        self.listening: dict[tuple[str, int], FakeWorker] = {}
        """Prefill workers by their hand-off address."""
        self._rooms: defaultdict[int, asyncio.Event] = defaultdict(asyncio.Event)

    def deliver(self, room: int) -> None:
        self._rooms[room].set()

    async def delivered(self, room: int) -> None:
        await self._rooms[room].wait()


@dataclass(frozen=True)
class Received:
    """One request as it came."""

    path: str
    raw: bytes
    body: dict[str, Any]


class _Aborted(Exception):
    pass


class _Restarted(Exception):
    """The prefill worker lives another life than the one that a request is meant for."""


@dataclass
class FakeWorker:
    """One simulated worker. `start` it, `register` it, and `stop` it."""

    name: str
    role: Role
    key: ClusterKey
    handoffs: Handoffs
    model: str = "tiny"
    revision: str = ""
    page_tokens: int = 4
    kv_dtype: str = "float32"
    max_context_tokens: int = 4096
    capacity_tokens: int = 65536
    ungranted_tokens: int = 0
    lease_s: float = 5.0
    audit_s: float = 0.0
    """Time between two audits; 0: none but those that `audit` publishes."""
    epoch: int = field(default_factory=time.time_ns)
    state: WorkerState = "ready"
    fault: Fault = Fault.NONE
    marks: bool = True
    """Whether the events of its streams say which tokens they are, as those of our engines do."""
    late_token: bool = False
    """Whether, as a prefill worker, it says its token at the end of a stream, as an engine does that is not ours."""
    faults_left: FaultsLeft | None = None
    """How many requests go wrong before all go well; workers may share it. None: all."""
    silent_s: float = 0.0
    """How long its scheduler says that it has not moved."""
    lose_batches: int = 0
    """So many of the next batches are not published, as if the network had dropped them."""
    snapshot_part_pages: int = 3
    received: list[Received] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    questions: list[tuple[int, int]] = field(default_factory=list)
    """(epoch, sequence) of every question about pages."""
    sequence: int = 0

    def __post_init__(self) -> None:
        self._held: dict[int, tuple[int, int]] = {}
        self._journal: list[Batch] = []
        self._totals: dict[HandoffTotals, HandoffTotals] = {}
        self._ended: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._tasks: list[asyncio.Task[None]] = []
        self.gate = asyncio.Event()
        """Cleared, it holds every stream after its second token."""
        self.gate.set()
        self.handing_over = asyncio.Event()
        """Cleared, it holds every prefill's stream between its token and the delivery of its pages."""
        self.handing_over.set()

    async def start(self) -> None:
        context = zmq.asyncio.Context.instance()
        self._publisher = context.socket(zmq.PUB)
        self._replay = context.socket(zmq.ROUTER)
        for bound in (self._publisher, self._replay):
            self.key.secure_server(bound)
            bound.bind(f"tcp://{_HOST}:*")
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/abort_request", self._abort)
        app.router.add_get("/health", self._health)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, _HOST, 0)
        await site.start()
        self._port = self._runner.addresses[0][1]
        self.url = f"http://{_HOST}:{self._port}"
        self.handoffs.listening[_HOST, self.handoff_port] = self
        self._tasks.append(asyncio.create_task(self._answer_questions()))
        if self.audit_s:
            self._tasks.append(asyncio.create_task(self._audit_for_ever()))

    async def stop(self) -> None:
        """Ends at once, like a killed process: nobody is told."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for ended in self._ended.values():
            ended.set()
        await self._runner.cleanup()
        for bound in (self._publisher, self._replay):
            bound.close(linger=0)

    @property
    def handoff_port(self) -> int:
        """Nobody listens there but `Handoffs`; it is a number that no other worker has."""
        return self._port if self.role == "prefill" else 0

    def registration(self, *, leaving: bool = False) -> Registration:
        def address(bound: zmq.asyncio.Socket) -> str:
            endpoint = bound.getsockopt(zmq.LAST_ENDPOINT)
            assert isinstance(endpoint, bytes)
            return endpoint.decode().rstrip("\0")

        return Registration(
            worker=self.name,
            epoch=self.epoch,
            role=self.role,
            state=self.state,
            url=self.url,
            handoff_host=_HOST if self.role == "prefill" else "",
            handoff_port=self.handoff_port,
            events=address(self._publisher),
            replay=address(self._replay),
            model=self.model,
            revision=self.revision,
            page_tokens=self.page_tokens,
            # Like an engine's agent, which knows it when the engine is up.
            kv_dtype="" if self.state == "starting" else self.kv_dtype,
            capacity_tokens=self.capacity_tokens,
            max_context_tokens=self.max_context_tokens,
            ungranted_tokens=self.ungranted_tokens,
            sequence=self.sequence,
            held_pages=len(self._held),
            audit_s=self.audit_s,
            load=wire.Load(silent_s=self.silent_s),
            handoffs=list(self._totals.values()),
            lease_s=self.lease_s,
            leaving=leaving,
        )

    async def register(self, router_url: str, *, leaving: bool = False) -> int:
        """Registers once. The HTTP status of the answer."""
        body = msgspec.json.encode(self.registration(leaving=leaving))
        headers = {SIGNATURE_HEADER: self.key.sign(body, time.time())}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{router_url}/internal/register", data=body, headers=headers) as response,
        ):
            if response.status == 200:
                answer = msgspec.json.decode(await response.read(), type=wire.Registered)
                if answer.drain is not None:
                    self.state = "draining" if answer.drain else "ready"
            return response.status

    def renew(self, router_url: str, every_s: float) -> asyncio.Task[None]:
        """Registers again and again, until stopped."""

        async def forever() -> None:
            while True:
                await self.register(router_url)
                await asyncio.sleep(every_s)

        task = asyncio.create_task(forever())
        self._tasks.append(task)
        return task

    async def store(self, parent: int, depth: int, ids: list[int]) -> None:
        """Takes pages into the cache and publishes that."""
        for offset, page in enumerate(ids):
            self._held[page] = (parent, depth + offset)
            parent = page
        first = self._held[ids[0]][0]
        await self._publish([Stored(first, depth, ids)])

    async def evict(self, ids: list[int]) -> None:
        """Drops pages from the cache and publishes that."""
        for page in ids:
            self._held.pop(page, None)
        await self._publish([Removed(ids)])

    async def clear(self) -> None:
        self._held.clear()
        await self._publish([Cleared()])

    async def audit(self, modulus: int = 1, residue: int = 0) -> None:
        """Publishes what it holds of one class of ids."""
        ids = [page for page in self._held if page % modulus == residue]
        await self.publish(Audit(self.name, self.epoch, self.sequence, modulus, residue, ids, len(self._held)))

    async def publish(self, message: wire.Published) -> None:
        """Says this to every router, true or not."""
        await self._publisher.send(encode(message))

    def forget_journal(self) -> None:
        """From now on, questions about what was before can only be answered by a snapshot."""
        self._journal.clear()

    async def _publish(self, events: list[PageEvent]) -> None:
        self.sequence += 1
        batch = Batch(self.name, self.epoch, self.sequence, events)
        self._journal.append(batch)
        if self.lose_batches:
            self.lose_batches -= 1
        else:
            await self.publish(batch)

    async def _audit_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self.audit_s)
            await self.audit()

    async def _answer_questions(self) -> None:
        while True:
            peer, payload = await self._replay.recv_multipart()
            request = decode_page_request(payload)
            self.questions.append((request.epoch, request.sequence))
            for message in self._answer(request.epoch, request.sequence):
                await self._replay.send_multipart([peer, encode(message)])

    def _answer(self, epoch: int, sequence: int) -> list[PageMessage]:
        end = CaughtUp(self.name, self.epoch, self.sequence)
        missed = [batch for batch in self._journal if batch.sequence > sequence]
        if epoch == self.epoch and len(missed) == self.sequence - sequence:
            return [*missed, end]
        pages = [
            Stored(parent, depth, [page])
            for page, (parent, depth) in sorted(self._held.items(), key=lambda entry: entry[1][1])
        ]
        size = self.snapshot_part_pages
        parts = [pages[start : start + size] for start in range(0, len(pages), size)] or [[]]
        return [*(Snapshot(self.name, self.epoch, index, part) for index, part in enumerate(parts)), end]

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _abort(self, request: web.Request) -> web.Response:
        rid = (await request.json())["rid"]
        self.aborted.append(rid)
        self._ended[rid].set()
        return web.Response()

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        body = json.loads(raw)
        self.received.append(Received(request.path, raw, body))
        try:
            return await self._respond(request, body)
        except _Aborted:
            return _flat_error(500, "Aborted by AbortReq.")
        except _Restarted as error:
            return _flat_error(500, f"KVTransferError: {error}")

    async def _respond(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        rid, fault = _rid(body), self._next_fault()
        match fault:
            case Fault.ERROR:
                return _flat_error(500, "simulated: out of memory")
            case Fault.HANDOFF if not (self.role == "prefill" and body.get("stream")):
                return _flat_error(500, NOT_HANDED_OVER)
            case Fault.APART:
                reason = "cannot reach the prefill worker at 127.0.0.1:1: simulated"
                return _flat_error(500, f"Decode handshake failed for request rank=0 with exception {reason}")
            case Fault.BAD_REQUEST:
                return _flat_error(400, "simulated: the request is wrong")
            case Fault.HANG:
                await self._wait(rid, asyncio.Event().wait())
            case Fault.DROP:
                _cut(request)
                return web.Response()
        ids = body.get("input_ids") or body.get("prompt") or []
        ids = ids if isinstance(ids, list) and ids and type(ids[0]) is int else []
        cached = 0
        began_s = time.monotonic()
        if self.role != "both":
            self._check_life(body)
        if self.role != "decode":
            cached = await self._prefill(ids, body)
        if self.role == "prefill" and body.get("stream"):
            return await self._first_token(request, body, self._counted(ids, fault), _generated(ids), cached, fault)
        if self.role == "prefill":
            self.handoffs.deliver(body["bootstrap_room"])
            return web.json_response(_answer(self.model, request.path, "x", self._counted(ids, fault), 1, cached))
        if self.role == "decode":
            await self._wait(rid, self.handoffs.delivered(body["bootstrap_room"]))
            await self._landed(ids, body, began_s)
        if fault is Fault.EMPTY:
            return web.Response(content_type="text/event-stream" if body.get("stream") else "application/json")
        first = _generated(ids)
        default = 16 if request.path == "/v1/completions" else max(1, 4 - first)
        count = body.get("max_tokens") or body.get("max_completion_tokens") or default
        count -= fault is Fault.SHORT
        if body.get("stream"):
            numbers = range(first, first + count)
            return await self._stream(request, body, self._counted(ids, fault), numbers, cached, fault)
        if fault is Fault.STALL:
            return await self._half(request, rid)
        text = " ".join(f"t{number}" for number in range(first, first + count))
        return web.json_response(_answer(self.model, request.path, text, self._counted(ids, fault), count, cached))

    async def _half(self, request: web.Request, rid: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(request)
        await response.write(b'{"id": ')
        await self._wait(rid, asyncio.Event().wait())
        return response

    async def _prefill(self, ids: list[int], body: dict[str, Any]) -> int:
        """Computes the pages that are not there. Cached tokens."""
        if not ids:
            return 0
        root, pages, held = self._match(ids, body)
        if held < len(pages):
            await self.store(pages[held - 1] if held else root, held, pages[held:])
        return min(held, (len(ids) - 1) // self.page_tokens) * self.page_tokens

    def _match(self, ids: list[int], body: dict[str, Any]) -> tuple[int, list[int], int]:
        """The prompt's root and its whole pages, and how many of those are here, from the first one on."""
        salt = (body.get("cache_salt") or "") + (body.get("extra_key") or "")
        root = root_id(namespace(self.model, self.revision, salt))
        pages = chain_ids(root, ids, self.page_tokens)
        held = 0
        while held < len(pages) and pages[held] in self._held:
            held += 1
        return root, pages, held

    def _check_life(self, body: dict[str, Any]) -> None:
        """Raises _Restarted where the request is meant for another life of its prefill worker."""
        host, epoch = parse_bound_host(body["bootstrap_host"])
        prefill = self.handoffs.listening[host, body["bootstrap_port"]]
        if epoch is not None and epoch != prefill.epoch:
            raise _Restarted(f"{prefill.name}: restarted: wanted epoch {epoch}, found {prefill.epoch}")

    async def _landed(self, ids: list[int], body: dict[str, Any], began_s: float) -> None:
        """Counts a hand-off that has ended well, and publishes what it came to."""
        host, _ = parse_bound_host(body["bootstrap_host"])
        _, _, held = self._match(ids, body)
        pages = -(-len(ids) // self.page_tokens) - held
        ended = Ended(
            room=body["bootstrap_room"],
            prefill=self.handoffs.listening[host, body["bootstrap_port"]].name,
            transport="simulated",
            pages=pages,
            moved_bytes=pages * PAGE_BYTES,
            prefix_tokens=held * self.page_tokens,
            took_s=time.monotonic() - began_s,
            reason="",
        )
        kind = HandoffTotals.kind(ended)
        self._totals[kind] = self._totals.get(kind, kind).plus(ended)
        await self.publish(wire.Handoffs(self.name, self.epoch, [ended]))

    @staticmethod
    def _counted(ids: list[int], fault: Fault) -> int:
        """Tokens of the prompt, as it says."""
        return len(ids) + (fault is Fault.OTHER_PROMPT)

    def _next_fault(self) -> Fault:
        if self.faults_left is None or self.fault is Fault.NONE:
            return self.fault
        self.faults_left.count -= 1
        return self.fault if self.faults_left.count >= 0 else Fault.NONE

    async def _stream(
        self,
        request: web.Request,
        body: dict[str, Any],
        prompt_tokens: int,
        numbers: range,
        cached: int,
        fault: Fault,
    ) -> web.StreamResponse:
        response = await self._begun(request)
        chat = request.path.startswith("/v1/chat")
        if fault is Fault.ERROR_EVENT_FIRST:
            await response.write(_error_event("simulated: prefill failed"))
            return response
        await response.write(self._opening(chat, body))
        for number in numbers:
            await self.before_token()
            await response.write(self._token(chat, body, number, last=number == numbers[-1]))
            if number == numbers[0]:
                continue
            await self._wait(_rid(body), self.gate.wait())
            match fault:
                case Fault.ERROR_EVENT:
                    await response.write(_error_event("simulated: out of memory"))
                    return response
                case Fault.ABORTED:
                    aborted = [{"index": 0, "finish_reason": "abort"}]
                    await response.write(_event(self.model, body["rid"], aborted))
                    await response.write(b"data: [DONE]\n\n")
                    return response
                case Fault.DIE_MIDSTREAM:
                    _cut(request)
                    return response
                case Fault.STALL:
                    await self._wait(_rid(body), asyncio.Event().wait())
        await response.write(self._ending(chat, body, _usage(prompt_tokens, len(numbers), cached)))
        return response

    async def before_token(self) -> None:
        """For a worker whose streams go on at a pace: it waits here for the next step."""

    async def _first_token(
        self,
        request: web.Request,
        body: dict[str, Any],
        prompt_tokens: int,
        number: int,
        cached: int,
        fault: Fault,
    ) -> web.StreamResponse:
        """Prefill's answer as a stream: the first token, when it is computed, and the end, when the pages are there."""
        response = await self._begun(request)
        chat = request.path.startswith("/v1/chat")
        usage = _usage(prompt_tokens, 1, cached)
        if not self.late_token:
            await response.write(self._opening(chat, body))
            await response.write(self._token(chat, body, number, last=False, usage=usage))
        try:
            await self._wait(_rid(body), self.handing_over.wait())
        except _Aborted:
            # Its answer has begun: there is no other to give.
            fault = Fault.DIE_MIDSTREAM
        if fault is Fault.HANDOFF:
            await response.write(_error_event(NOT_HANDED_OVER))
            return response
        if fault is Fault.DIE_MIDSTREAM:
            _cut(request)
            return response
        self.handoffs.deliver(body["bootstrap_room"])
        if self.late_token:
            await response.write(self._opening(chat, body))
            await response.write(self._token(chat, body, number, last=True, usage=usage))
        await response.write(self._ending(chat, body, usage))
        return response

    @staticmethod
    async def _begun(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        return response

    def _opening(self, chat: bool, body: dict[str, Any]) -> bytes:
        opening = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return _event(self.model, body["rid"], [{"index": 0, **opening}]) if chat else b""

    def _token(
        self, chat: bool, body: dict[str, Any], number: int, *, last: bool, usage: dict[str, Any] | None = None
    ) -> bytes:
        delta = {"delta": {"content": f"t{number} "}} if chat else {"text": f"t{number} "}
        mark = f"mainstem: {'+' if last else FIRST_TOKEN + number}\n".encode() if self.marks else b""
        stats = usage if (body.get("stream_options") or {}).get("continuous_usage_stats") else None
        if stats is not None and not chat:
            # The engine leaves it out there.
            stats = {**stats, "prompt_tokens_details": None}
        return mark + _event(self.model, body["rid"], [{"index": 0, **delta, "finish_reason": None}], stats)

    def _ending(self, chat: bool, body: dict[str, Any], usage: dict[str, Any]) -> bytes:
        last: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        ending = _event(self.model, body["rid"], [{"index": 0, **last, "finish_reason": "length"}])
        if (body.get("stream_options") or {}).get("include_usage"):
            ending += _event(self.model, body["rid"], [], usage)
        return ending + b"data: [DONE]\n\n"

    async def _wait(self, rid: str, event: Any) -> None:
        """Until the event, or an abort of this request, which raises _Aborted."""
        wanted, ended = asyncio.ensure_future(event), asyncio.ensure_future(self._ended[rid].wait())
        try:
            await asyncio.wait({wanted, ended}, timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
            if not wanted.done():
                raise _Aborted
        finally:
            wanted.cancel()
            ended.cancel()


def _cut(request: web.Request) -> None:
    """As the connection of a process that is killed."""
    assert request.transport is not None
    request.transport.close()


def _rid(body: dict[str, Any]) -> str:
    """By which the request is aborted; of a batch of prompts, by its first one."""
    prompt = body.get("prompt")
    batch = isinstance(prompt, list) and type(prompt[0]) is not int
    return f"{body['rid']}_0" if batch else str(body["rid"])


def _usage(prompt_tokens: int, completion_tokens: int, cached: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        # The engine leaves it out at 0.
        "prompt_tokens_details": {"cached_tokens": cached} if cached else None,
    }


def _answer(model: str, path: str, text: str, prompt_tokens: int, count: int, cached: int) -> dict[str, Any]:
    chat = path.startswith("/v1/chat")
    said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return {
        "id": "fake",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, **said, "finish_reason": "length"}],
        "usage": _usage(prompt_tokens, count, cached),
    }


def _generated(ids: list[int]) -> int:
    """How many tokens at the end of a prompt are of this worker's making."""
    return next((place for place, token in enumerate(reversed(ids)) if token < FIRST_TOKEN), len(ids))


def _event(model: str, rid: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
    chunk = {"id": rid, "object": "chat.completion.chunk", "created": 0, "model": model, "choices": choices}
    return b"data: " + json.dumps({**chunk, "usage": usage}).encode() + b"\n\n"


def _error_event(message: str) -> bytes:
    error = {"object": "error", "message": message, "type": "INTERNAL_SERVER_ERROR", "param": None, "code": 500}
    return b"data: " + json.dumps({"error": error}).encode() + b"\n\n"


def _flat_error(status: int, message: str) -> web.Response:
    error = {"object": "error", "message": message, "type": "Error", "param": None, "code": status}
    return web.json_response(error, status=status)
