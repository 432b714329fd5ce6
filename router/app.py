"""The router's HTTP face: what is served where, and the parts that answer it, put together.

/v1/chat/completions, /v1/completions     relayed, below the framework: plain ASGI
/v1/models, /health, /ready, /metrics
/internal/register                        workers' agents, signed with the cluster's key
/internal/drain                           `mainstem drain` and `mainstem restart`, signed too
/, /static, /api/state, /api/events, /api/explain/ID    the dashboard
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from fastapi import Depends, FastAPI, Request, Response, params
from fastapi.responses import FileResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from router.admission import Admission
from router.api_keys import ApiKeys
from router.audit import Audits
from router.client import Client, Message, Receive, Send
from router.config import RouterSpec
from router.dispatch import Dispatcher
from router.fleet import Change, FeedMode, Fleet, Worker
from router.follower import Follower
from router.gossip_link import GossipLink
from router.handoffs import Handoffs
from router.index import Index
from router.ledger import Ledger
from router.metrics import Metrics
from router.openai import ApiError, Endpoint
from router.placement import Placement
from router.planner import Planner
from router.prober import Prober
from router.render import Renderer
from router.state import explanation, snapshot
from router.upstream import Upstream
from transfer.auth import SIGNATURE_HEADER, BadSignature, ClusterKey
from transfer.ended import Ended
from transfer.undecodable import UNDECODABLE
from transfer.wire import VERSION, Drain, Registered, Registration

log = logging.getLogger(__name__)

EXPIRE_S = 0.25
"""How often leases are looked at."""
FIRST_WORDS_S = 3.0
"""Of a router that has just begun: within which workers that live have said so. Meanwhile requests wait."""
EVENT_S = 1.0
"""How often the dashboard is told."""
MAX_REGISTRATION_BYTES = 256 * 1024
"""Room for the sums of a decode worker that has thousands of pairs of prefill worker and transport."""
NO_STORE = {"cache-control": "no-store"}
"""What the dashboard shows is true for a moment, and says who asks for what: no cache keeps it."""

_here = Path(__file__).parent
_decode_registration = msgspec.json.Decoder(Registration).decode
_decode_drain = msgspec.json.Decoder(Drain).decode


class Router:
    """All that one router knows and does. Made outside of any loop, opened in one by `running`."""

    def __init__(
        self,
        spec: RouterSpec,
        *,
        clock_s: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        """Reads the key, the tokenizer and the API keys. Raises OSError or ValueError, in one line."""
        self.spec = spec
        self.id = uuid.uuid4().hex
        self.key = ClusterKey.read(spec.key_file)
        self.api_keys = None if spec.section.api_key_file is None else ApiKeys.read(spec.section.api_key_file)
        self.renderer = Renderer.load(spec.model_path)
        self.fleet = Fleet(spec.section.hung_s)
        self.index = Index(spec.section.index_max_bytes)
        self.placement = Placement(spec.section, self.fleet)
        self.ledger = Ledger()
        self.handoffs = Handoffs()
        self.audits = Audits()
        self.clock_s = clock_s
        self.wall_s = wall_s
        self.started_s = clock_s()
        self._wishes: dict[str, tuple[int, bool]] = {}
        """By worker: of which life, and whether it shall drain. Its agent says the same as soon as it has heard."""
        self._was_ready = False
        """Whether the pages of all workers were known at some time."""
        section = spec.section
        self.planner = Planner(
            self.fleet,
            self.index,
            self.placement,
            reserve_tokens=section.decode_reserve_tokens,
            backlog_s=section.prefill_backlog_s,
            aggregate=section.on_no_prefill == "aggregate",
        )
        self.admission = Admission(section, self.fleet, self.planner, clock_s)
        self.metrics = Metrics(
            self.ledger,
            self.fleet,
            self.index,
            self.handoffs,
            self.audits,
            self.placement,
            self.admission,
        )
        self.closing = asyncio.Event()
        """Set when the server is told to stop, so that streams without an end find one."""
        self.follower: Follower
        self.dispatcher: Dispatcher

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Sockets and tasks, from here to the end."""
        self.fleet.all_known_at_s = self.clock_s() + FIRST_WORDS_S
        gossip = self._gossip()
        upstream = Upstream()
        self.follower = Follower(self.key, self.index, self.fleet, self.clock_s, self._handed_over, self.audits)
        self.dispatcher = Dispatcher(
            model=self.spec.model,
            section=self.spec.section,
            fleet=self.fleet,
            planner=self.planner,
            admission=self.admission,
            placement=self.placement,
            renderer=self.renderer,
            upstream=upstream,
            ledger=self.ledger,
            on_end=self.metrics.ended,
            clock_s=self.clock_s,
            wall_s=self.wall_s,
        )
        prober = Prober(self.fleet, upstream.probe, self.clock_s)
        keeping = [asyncio.create_task(self._expire()), asyncio.create_task(prober.run())]
        try:
            yield
        finally:
            self.closing.set()
            for task in keeping:
                task.cancel()
            await asyncio.gather(*keeping, return_exceptions=True)
            if gossip is not None:
                await gossip.close()
            await self.follower.close()
            await upstream.close()

    def _gossip(self) -> GossipLink | None:
        spec = self.spec
        if not spec.gossip_port:
            return None
        link = GossipLink(
            self.key,
            self.fleet,
            name=spec.name,
            host=spec.section.host,
            port=spec.gossip_port,
            life=int(1e9 * self.wall_s()),
            clock_s=self.clock_s,
        )
        link.start(spec.peers)
        return link

    def _handed_over(self, decode: str, ended: Ended) -> None:
        self.ledger.handed_over(ended)
        self.placement.handed_over(ended, decode)

    async def _expire(self) -> None:
        while True:
            for name in self.fleet.expire(self.clock_s()):
                log.warning("worker lost name=%s", name)
                self._forget(self.fleet[name])
            await asyncio.sleep(EXPIRE_S)

    def register(self, registration: Registration) -> None:
        """Takes in a worker's registration, which is also its heartbeat. Raises ValueError where it does not fit."""
        self._check(registration)
        before = self.fleet.get(registration.worker)
        was_hung = before is not None and before.hung
        change = self.fleet.register(registration, self.clock_s())
        if change in (Change.STALE, Change.LEFT, Change.REPLACED):
            log.info("worker %s name=%s epoch=%d", change, registration.worker, registration.epoch)
        if change in (Change.LEFT, Change.REPLACED) and before is not None:
            self._forget(before)
        elif before is not None and before.hung != was_hung:
            log.warning("worker %s name=%s", "moves again" if was_hung else "hangs", before.name)
            if before.hung:
                self.dispatcher.worker_lost(before, f"has not moved for {registration.load.silent_s:.0f} s")
        if change is not Change.STALE:
            # A goodbye brings the last sums of that life.
            self.handoffs.registered(registration.worker, registration.epoch, registration.handoffs)
        if change not in (Change.STALE, Change.LEFT):
            self.follower.registered(registration)

    def answer(self, registration: Registration) -> Registered:
        """What a worker that has registered is told."""
        epoch, drain = self._wishes.get(registration.worker, (0, False))
        if epoch != registration.epoch or registration.state == "starting":
            return Registered(router=self.id)
        if drain == (registration.state == "draining"):
            # It has heard. Whatever else it is told later comes from somebody else.
            del self._wishes[registration.worker]
            return Registered(router=self.id)
        return Registered(router=self.id, drain=drain)

    def drain(self, wish: Drain) -> None:
        """Notes that a worker shall drain, or not, or give its requests away.

        Raises KeyError where it is not known, ValueError for a wish in other words than ours.
        """
        if wish.version != VERSION:
            raise ValueError(f"version: wanted {VERSION}, found {wish.version}")
        worker = self.fleet[wish.worker]
        if wish.move:
            self.dispatcher.move(worker)
        else:
            self._wishes[wish.worker] = worker.registration.epoch, wish.drain

    def _check(self, registration: Registration) -> None:
        if registration.version != VERSION:
            raise ValueError(f"version: wanted {VERSION}, found {registration.version}")
        if registration.model != self.spec.model:
            raise ValueError(f"model: wanted {self.spec.model!r}, found {registration.model!r}")
        if registration.state == "starting" or registration.leaving:
            # What an engine is to be is known when it is up; and a goodbye need not fit.
            return
        for worker in self.fleet:
            if worker.name == registration.worker or worker.lost or worker.registration.state == "starting":
                continue
            for field in ("revision", "page_tokens", "kv_dtype"):
                wanted, found = getattr(worker.registration, field), getattr(registration, field)
                if wanted != found:
                    raise ValueError(f"{field}: wanted {wanted!r} as {worker.name} has, found {found!r}")

    def _forget(self, worker: Worker) -> None:
        """This life of the worker is over."""
        self.follower.forget(worker.name)
        self.placement.lost(worker.name)
        self.dispatcher.worker_lost(worker)

    def unready(self) -> list[str]:
        """Why no request should be sent here yet; empty when all is well."""
        ready = [worker for worker in self.fleet if worker.state() in ("ready", "suspect")]
        roles = {worker.role for worker in ready}
        reasons = []
        if "both" not in roles:
            reasons += [f"no {role} worker is ready" for role in ("prefill", "decode") if role not in roles]
        prefills = [worker for worker in ready if worker.role != "decode"]
        unknown = [worker.name for worker in prefills if worker.mode is FeedMode.LOAD_ONLY]
        if len(unknown) == len(prefills) or not self._was_ready:
            # Later, the pages of one worker are no reason to turn requests away: it is chosen by load meanwhile.
            reasons += [f"the pages of {name} are not known yet" for name in unknown]
        self._was_ready |= not reasons
        return reasons

    def snapshot(self) -> dict[str, Any]:
        steady_s = self.clock_s()
        return snapshot(
            cluster=self.spec.cluster,
            router=self.id,
            model=self.spec.model,
            uptime_s=steady_s - self.started_s,
            now_s=self.wall_s(),
            steady_s=steady_s,
            fleet=self.fleet,
            index=self.index,
            ledger=self.ledger,
            audits=self.audits,
            placement=self.placement,
            waiting_requests=len(self.admission),
        )

    def tenant(self, header: str) -> str | None:
        """Whose request this is, by its `authorization`; None where a key is wanted and this is none."""
        return "" if self.api_keys is None else self.api_keys.tenant(header)


class _Relay:
    """One of the two routed endpoints, as an ASGI application."""

    def __init__(self, router: Router, endpoint: Endpoint) -> None:
        self._router = router
        self._endpoint = endpoint

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        client = Client(receive, send, scope["headers"])
        tenant = self._router.tenant(client.header("authorization"))
        if tenant is not None:
            await self._router.dispatcher.serve(self._endpoint, client, tenant)
        else:
            await client.answer(401, _unauthorized().body(), {"content-type": "application/json"})


class _Front:
    """The whole application: a request for an answer goes straight to its relay, anything else to FastAPI.

    FastAPI's layers take about as long as choosing workers does.
    """

    def __init__(self, app: FastAPI, relays: Mapping[str, _Relay]) -> None:
        self._app = app
        self._relays = relays

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        relay = self._relays.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        await (relay or self._app)(scope, receive, send)


def create_app(router: Router) -> _Front:
    """The application around a router. Opening and closing the router is its lifespan."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with router.running():
            yield

    app = FastAPI(title="Mainstem router", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    relays = {endpoint.value: _Relay(router, endpoint) for endpoint in Endpoint}
    for path, relay in relays.items():
        # So that FastAPI can tell a wrong method from a wrong path.
        app.router.routes.append(Route(path, relay, methods=["POST"]))
    app.add_exception_handler(HTTPException, _not_served)
    app.add_exception_handler(ApiError, _api_error)

    async def known(request: Request) -> None:
        if router.tenant(request.headers.get("authorization", "")) is None:
            raise _unauthorized()

    # All but /health and /ready, which say nothing of anybody's, and what workers call, which is signed.
    _add_service(app, router, [Depends(known)])
    _add_dashboard(app, router, [Depends(known)])
    return _Front(app, relays)


def _add_service(app: FastAPI, router: Router, known: Sequence[params.Depends]) -> None:
    def card() -> dict[str, Any]:
        contexts = [worker.registration.max_context_tokens for worker in router.fleet if not worker.lost]
        return {
            "id": router.spec.model,
            "object": "model",
            "created": int(router.wall_s() - (router.clock_s() - router.started_s)),
            "owned_by": "mainstem",
            "max_model_len": min(contexts, default=None),
        }

    @app.get("/v1/models", dependencies=known)
    async def models() -> Response:
        return _json({"object": "list", "data": [card()]})

    @app.get("/v1/models/{name:path}", dependencies=known)
    async def model(name: str) -> Response:
        if name != router.spec.model:
            message = f"model: wanted {router.spec.model!r}, found {name[:200]!r}"
            return _error(ApiError(404, message, param="model", code="model_not_found"))
        return _json(card())

    @app.get("/health")
    async def health() -> Response:
        return _json({"status": "ok", "router": router.id})

    @app.get("/ready")
    async def ready() -> Response:
        reasons = router.unready()
        return _json({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)

    @app.get("/metrics", dependencies=known)
    async def metrics() -> Response:
        return Response(router.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/internal/register")
    async def register(request: Request) -> Response:
        try:
            body = await _signed(router, request)
        except ApiError as error:
            return _error(error)
        try:
            registration = _decode_registration(body)
            router.register(registration)
        except (*UNDECODABLE, ValueError) as error:
            return _error(ApiError(400, str(error)))
        return _json(router.answer(registration))

    @app.post("/internal/drain")
    async def drain(request: Request) -> Response:
        try:
            wish = _decode_drain(await _signed(router, request))
            router.drain(wish)
        except ApiError as error:
            return _error(error)
        except (*UNDECODABLE, ValueError) as error:
            return _error(ApiError(400, str(error)))
        except KeyError:
            return _error(ApiError(404, f"worker: wanted one of this cluster's, found {wish.worker[:200]!r}"))
        return _json({"worker": wish.worker, "drain": wish.drain, "move": wish.move})


async def _signed(router: Router, request: Request) -> bytes:
    """The body of a request from within the cluster. Raises ApiError."""
    if int(request.headers.get("content-length") or MAX_REGISTRATION_BYTES + 1) > MAX_REGISTRATION_BYTES:
        raise ApiError(413, f"body: wanted at most {MAX_REGISTRATION_BYTES} bytes and their number")
    body = await request.body()
    try:
        router.key.verify(request.headers.get(SIGNATURE_HEADER), body, router.wall_s())
    except BadSignature as error:
        raise ApiError(401, str(error)) from None
    return body


def _add_dashboard(app: FastAPI, router: Router, known: Sequence[params.Depends]) -> None:
    if (_here / "static").is_dir():
        app.mount("/static", StaticFiles(directory=_here / "static"), name="static")

    @app.get("/", dependencies=known)
    async def dashboard() -> Response:
        return FileResponse(_here / "dashboard.html", media_type="text/html", headers=NO_STORE)

    @app.get("/api/state", dependencies=known)
    async def state() -> Response:
        return _json(router.snapshot(), headers=NO_STORE)

    @app.get("/api/events", dependencies=known)
    async def events() -> Response:
        async def ticks() -> AsyncIterator[bytes]:
            # Ends when the client leaves, as writing is cancelled then, or when the router closes.
            while not router.closing.is_set():
                yield b"data: " + msgspec.json.encode(router.snapshot()) + b"\n\n"
                try:
                    await asyncio.wait_for(router.closing.wait(), EVENT_S)
                except TimeoutError:
                    continue

        return StreamingResponse(ticks(), media_type="text/event-stream", headers=NO_STORE)

    @app.get("/api/explain/{request_id}", dependencies=known)
    async def explain(request_id: str) -> Response:
        record = router.ledger.get(request_id)
        if record is None:
            return _error(ApiError(404, "request: wanted one of the last, found none with this id"))
        return _json(explanation(record))


async def _not_served(request: Request, error: Exception) -> Response:
    """Paths and methods that do not exist, in the shape that clients of the API read."""
    assert isinstance(error, HTTPException)
    return _error(ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}"))


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error(error)


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


def _error(error: ApiError) -> Response:
    # A browser asks for a name and a password then: the password is the key.
    headers = {"www-authenticate": 'Basic realm="mainstem"'} if error.status == 401 else None
    return Response(error.body(), error.status, headers, media_type="application/json")


def _unauthorized() -> ApiError:
    return ApiError(401, "authorization: wanted the API key as a bearer token", code="invalid_api_key")
