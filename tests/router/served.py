"""A router over real sockets, between real clients and simulated workers, for tests of what a client sees."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from router.app import Router
from router.events import text_of
from router.fake_worker import FakeWorker

PREFIX = "The quick brown fox jumps over the lazy dog. " * 20
BOTH = ("p0", "p1", "d0", "d1")
MESSAGE = {"max_tokens": 6, "stream_options": {"include_usage": True}}
WHOLE = "t0 t1 t2 t3 t4 t5 "
"""What simulated workers answer to it."""


@dataclass
class Cluster:
    """One router and its workers."""

    router: Router
    url: str
    session: aiohttp.ClientSession
    workers: dict[str, FakeWorker] = field(default_factory=dict)

    async def until_ready(self) -> None:
        await self.until(lambda: not self.router.unready())

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(15):
            while not holds():
                await asyncio.sleep(0.01)

    async def post(self, body: Any, path: str = "/v1/chat/completions") -> tuple[int, Any, dict[str, str]]:
        """Status, parsed body, headers in lower case."""
        data = body if isinstance(body, bytes) else json.dumps(body)
        async with self.session.post(self.url + path, data=data) as response:
            return response.status, await response.json(), {key.lower(): val for key, val in response.headers.items()}

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.session.get(self.url + path) as response:
            return response.status, await response.json()

    async def text(self, path: str) -> tuple[int, str]:
        async with self.session.get(self.url + path) as response:
            return response.status, await response.text()

    async def events(self, body: dict[str, Any]) -> tuple[int, list[str]]:
        """Status, and the stream's data lines."""
        async with self.session.post(self.url + "/v1/chat/completions", json={**body, "stream": True}) as response:
            raw = (await response.read()).decode()
            return response.status, [line[6:] for line in raw.split("\n") if line.startswith("data: ")]

    async def last(self) -> dict[str, Any]:
        """The newest request in the state, once it is over."""
        await self.until(lambda: self.router.ledger.newest(1)[0].outcome != "running")
        _, state = await self.get("/api/state")
        newest: dict[str, Any] = state["requests"][0]
        return newest

    def aborted(self) -> set[str]:
        """What any worker was told to drop."""
        return {rid for worker in self.workers.values() for rid in worker.aborted}

    def received(self, name: str) -> dict[str, Any]:
        """The body that this worker got last."""
        return self.workers[name].received[-1].body


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


def spoken(events: list[str]) -> str:
    """The text of a stream's data lines."""
    return "".join(text_of(json.loads(event)) for event in events if event != "[DONE]")


def chat(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "system", "content": text}], **fields}
