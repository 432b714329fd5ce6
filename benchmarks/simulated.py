"""A real router over real sockets, in this process, for simulated workers to register with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn

from router.app import Router, create_app
from router.config import RouterSpec
from router.server import listen

STARTED_S = 15.0
STOPPED_S = 10.0


@asynccontextmanager
async def serving(spec: RouterSpec) -> AsyncIterator[tuple[Router, str]]:
    """The router and its URL, on a free port."""
    router = Router(spec)
    with listen("127.0.0.1", 0) as bound:
        server = uvicorn.Server(
            uvicorn.Config(create_app(router), log_config=None, access_log=False, timeout_graceful_shutdown=1)
        )
        running = asyncio.create_task(server.serve(sockets=[bound]))
        try:
            async with asyncio.timeout(STARTED_S):
                while not server.started:
                    await asyncio.sleep(0.01)
            yield router, f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            router.closing.set()
            server.should_exit = True
            await asyncio.wait_for(running, STOPPED_S)
