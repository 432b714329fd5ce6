"""The router's HTTP face: what is served where, and the parts that answer it, put together.

/v1/chat/completions, /v1/completions     relayed, below the framework: plain ASGI
/v1/models, /health, /ready, /metrics
/internal/register                        workers' agents, signed with the cluster's key
/, /static, /api/state, /api/events, /api/explain/ID    the dashboard
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.staticfiles import StaticFiles

from router.audit import Audits
from router.client import Client, Message, Receive, Send
from router.config import RouterSpec
from router.dispatch import Dispatcher
from router.fleet import Change, FeedMode, Fleet
from router.follower import Follower
from router.gossip_link import GossipLink
from router.handoffs import Handoffs
from router.index import Index
from router.ledger import Ledger
from router.metrics import Metrics
from router.openai import ApiError, Endpoint
from router.placement import Placement
from router.planner import Planner
from router.render import Renderer
from router.state import explanation, snapshot
from router.upstream import Upstream
from transfer.auth import SIGNATURE_HEADER, BadSignature, ClusterKey
from transfer.ended import Ended
from transfer.undecodable import UNDECODABLE
from transfer.wire import VERSION, Registered, Registration

log = logging.getLogger(__name__)

EXPIRE_S = 0.25
"""How often leases are looked at."""
EVENT_S = 1.0
"""How often the dashboard is told."""
MAX_REGISTRATION_BYTES = 256 * 1024
"""Room for the sums of a decode worker that has thousands of pairs of prefill worker and transport."""
NO_STORE = {"cache-control": "no-store"}
"""What the dashboard shows is true for a moment, and says who asks for what: no cache keeps it."""

_here = Path(__file__).parent
_decode_registration = msgspec.json.Decoder(Registration).decode


class Router:
    """All that one router knows and does. Made outside of any loop, opened in one by `running`."""

    def __init__(
        self,
        spec: RouterSpec,
        *,
        clock_s: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        """Reads the key, the tokenizer and the API key. Raises OSError or ValueError, in one line."""
        self.spec = spec
        self.id = uuid.uuid4().hex
        self.key = ClusterKey.read(spec.key_file)
        self.api_key = _api_key(spec.section.api_key_file)
        self.renderer = Renderer.load(spec.model_path)
        self.fleet = Fleet()
        self.index = Index(spec.section.index_max_bytes)
        self.placement = Placement(spec.section, self.fleet)
        self.ledger = Ledger()
        self.handoffs = Handoffs()
        self.audits = Audits()
        self.clock_s = clock_s
        self.wall_s = wall_s
        self.started_s = clock_s()
        self._was_ready = False
        """Whether the pages of all workers were known at some time."""
        self.metrics = Metrics(self.ledger, self.fleet, self.index, self.handoffs, self.audits, self.placement, clock_s)
        self.closing = asyncio.Event()
        """Set when the server is told to stop, so that streams without an end find one."""
        self.follower: Follower
        self.dispatcher: Dispatcher

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Sockets and tasks, from here to the end."""
        gossip = self._gossip()
        upstream = Upstream()
        self.follower = Follower(self.key, self.index, self.fleet, self.clock_s, self._handed_over, self.audits)
        self.dispatcher = Dispatcher(
            model=self.spec.model,
            section=self.spec.section,
            fleet=self.fleet,
            planner=Planner(self.fleet, self.index, self.placement),
            placement=self.placement,
            renderer=self.renderer,
            upstream=upstream,
            ledger=self.ledger,
            on_end=self.metrics.ended,
            clock_s=self.clock_s,
            wall_s=self.wall_s,
        )
        expiring = asyncio.create_task(self._expire())
        try:
            yield
        finally:
            self.closing.set()
            expiring.cancel()
            await asyncio.gather(expiring, return_exceptions=True)
            await self.dispatcher.close()
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
                self._forget(name)
            await asyncio.sleep(EXPIRE_S)

    def register(self, registration: Registration) -> None:
        """Takes in a worker's registration, which is also its heartbeat. Raises ValueError where it does not fit."""
        self._check(registration)
        change = self.fleet.register(registration, self.clock_s())
        if change in (Change.STALE, Change.LEFT, Change.REPLACED):
            log.info("worker %s name=%s epoch=%d", change, registration.worker, registration.epoch)
        if change in (Change.LEFT, Change.REPLACED):
            self._forget(registration.worker)
        if change is not Change.STALE:
            # A goodbye brings the last sums of that life.
            self.handoffs.registered(registration.worker, registration.epoch, registration.handoffs)
        if change not in (Change.STALE, Change.LEFT):
            self.follower.registered(registration)

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

    def _forget(self, name: str) -> None:
        self.follower.forget(name)
        self.placement.lost(name)
        self.dispatcher.worker_lost(name)

    def unready(self) -> list[str]:
        """Why no request should be sent here yet; empty when all is well."""
        now_s = self.clock_s()
        ready = [worker for worker in self.fleet if worker.state(now_s) in ("ready", "suspect")]
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
        )

    def authorized(self, header: str | None) -> bool:
        """Whether a client may use /v1."""
        if self.api_key is None:
            return True
        return hmac.compare_digest((header or "").encode(), f"Bearer {self.api_key}".encode())


class _Relay:
    """One of the two routed endpoints, as an ASGI application."""

    def __init__(self, router: Router, endpoint: Endpoint) -> None:
        self._router = router
        self._endpoint = endpoint

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        client = Client(receive, send)
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if self._router.authorized(header.decode("latin-1")):
            await self._router.dispatcher.serve(self._endpoint, client)
        else:
            await client.answer(401, _unauthorized().body(), {"content-type": "application/json"})


def create_app(router: Router) -> FastAPI:
    """The application around a router. Opening and closing the router is its lifespan."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with router.running():
            yield

    app = FastAPI(title="Mainstem router", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    for endpoint in Endpoint:
        app.router.routes.append(Route(endpoint.value, _Relay(router, endpoint), methods=["POST"]))
    app.add_exception_handler(HTTPException, _not_served)
    _add_service(app, router)
    _add_dashboard(app, router)
    return app


def _add_service(app: FastAPI, router: Router) -> None:
    def card() -> dict[str, Any]:
        contexts = [worker.registration.max_context_tokens for worker in router.fleet if not worker.lost]
        return {
            "id": router.spec.model,
            "object": "model",
            "created": int(router.wall_s() - (router.clock_s() - router.started_s)),
            "owned_by": "mainstem",
            "max_model_len": min(contexts, default=None),
        }

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        if not router.authorized(request.headers.get("authorization")):
            return _error(_unauthorized())
        return _json({"object": "list", "data": [card()]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        if not router.authorized(request.headers.get("authorization")):
            return _error(_unauthorized())
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

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(router.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/internal/register")
    async def register(request: Request) -> Response:
        if int(request.headers.get("content-length") or MAX_REGISTRATION_BYTES + 1) > MAX_REGISTRATION_BYTES:
            return _error(
                ApiError(413, f"registration: wanted at most {MAX_REGISTRATION_BYTES} bytes and their number")
            )
        body = await request.body()
        try:
            router.key.verify(request.headers.get(SIGNATURE_HEADER), body, router.wall_s())
        except BadSignature as error:
            return _error(ApiError(401, str(error)))
        try:
            router.register(_decode_registration(body))
        except (*UNDECODABLE, ValueError) as error:
            return _error(ApiError(400, str(error)))
        return Response(msgspec.json.encode(Registered(router=router.id)), media_type="application/json")


def _add_dashboard(app: FastAPI, router: Router) -> None:
    if (_here / "static").is_dir():
        app.mount("/static", StaticFiles(directory=_here / "static"), name="static")

    @app.get("/")
    async def dashboard() -> Response:
        return FileResponse(_here / "dashboard.html", media_type="text/html", headers=NO_STORE)

    @app.get("/api/state")
    async def state() -> Response:
        return _json(router.snapshot(), headers=NO_STORE)

    @app.get("/api/events")
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

    @app.get("/api/explain/{request_id}")
    async def explain(request_id: str) -> Response:
        record = router.ledger.get(request_id)
        if record is None:
            return _error(ApiError(404, "request: wanted one of the last, found none with this id"))
        return _json(explanation(record))


async def _not_served(request: Request, error: Exception) -> Response:
    """Paths and methods that do not exist, in the shape that clients of the API read."""
    assert isinstance(error, HTTPException)
    return _error(ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}"))


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


def _error(error: ApiError) -> Response:
    return Response(error.body(), error.status, media_type="application/json")


def _unauthorized() -> ApiError:
    return ApiError(401, "authorization: wanted the API key as a bearer token", code="invalid_api_key")


def _api_key(path: Path | None) -> str | None:
    if path is None:
        return None
    key = path.read_text().strip()
    if not key:
        raise ValueError(f"{path}: wanted an API key, found an empty file")
    return key
