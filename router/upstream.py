"""One request to one worker: send it, read its answer, say in one way what went wrong."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence

import aiohttp

from router.answer import Failure, failure_in
from router.faults import Fault, LegFailed, refused

log = logging.getLogger(__name__)

CONNECT_S = 5.0
ABORT_S = 2.0
"""An abort that the worker has not taken by then is given up: it will see the closed connection."""
PROBE_S = 1.0
IDLE_S = 2.0
"""Connections are kept shorter than a worker keeps them (5 s), or it would close one just as it is used."""
MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""Bound on an answer that comes in one piece."""
READ_BYTES = 64 * 1024


class Upstream:
    """Connections to all workers. Deadlines of whole requests are the caller's."""

    def __init__(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            # Workers set none, and to look through those that there are not takes a while.
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers={"accept-encoding": "identity", "content-type": "application/json"},
            read_bufsize=READ_BYTES,
        )
        self._aborting: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Waits for aborts that are on their way; each has its deadline."""
        if self._aborting:
            await asyncio.wait(self._aborting, timeout=ABORT_S)
        await self._session.close()

    async def open(self, worker: str, url: str, body: bytes, trace: str = "") -> aiohttp.ClientResponse:
        """An answer whose status is 200, its body unread. Raises LegFailed.

        trace  a `traceparent`
        """
        try:
            response = await self._session.post(
                url, data=body, headers={"traceparent": trace} if trace else None, allow_redirects=False
            )
        except aiohttp.ClientConnectorError as error:
            raise LegFailed(worker, Fault.UNREACHABLE, f"{worker} cannot be reached") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise LegFailed(worker, Fault.BROKEN, f"{worker} closed the connection without an answer") from error
        if response.status != 200:
            raise await self._refused(worker, response)
        return response

    async def read_all(self, worker: str, response: aiohttp.ClientResponse) -> bytes:
        """The whole body. Raises LegFailed where it is cut off or too long."""
        pieces = bytearray()
        while piece := await self.read(worker, response):
            pieces += piece
            if len(pieces) > MAX_ANSWER_BYTES:
                response.close()
                raise LegFailed(worker, Fault.BROKEN, f"{worker} sent more than {MAX_ANSWER_BYTES} bytes")
        return bytes(pieces)

    async def read(self, worker: str, response: aiohttp.ClientResponse) -> bytes:
        """What has come of the body, at least a byte; b"" at its proper end. Raises LegFailed."""
        try:
            return await response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise LegFailed(worker, Fault.BROKEN, f"{worker} closed the connection within its answer") from error

    def abort_soon(self, worker: str, base_url: str, rids: Sequence[str]) -> None:
        """`abort`, which nobody waits for."""
        task = asyncio.create_task(self.abort(worker, base_url, rids))
        self._aborting.add(task)
        task.add_done_callback(self._aborting.discard)

    async def probe(self, base_url: str) -> bool:
        """Whether the worker's HTTP side answers. Never raises; takes at most PROBE_S."""
        try:
            timeout = aiohttp.ClientTimeout(total=PROBE_S)
            async with self._session.get(f"{base_url}/health", timeout=timeout) as response:
                await response.read()
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def abort(self, worker: str, base_url: str, rids: Sequence[str]) -> None:
        """Tells the worker to drop these requests, one after the other, until one is not taken.

        Does not fail: who cannot hear it has dropped them, or will.
        """
        for rid in rids:
            try:
                async with self._session.post(
                    f"{base_url}/abort_request",
                    data=json.dumps({"rid": rid}),
                    timeout=aiohttp.ClientTimeout(total=ABORT_S),
                ) as response:
                    await response.read()
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                log.info("abort not taken worker=%s rid=%s error=%s", worker, rid, type(error).__name__)
                return

    async def _refused(self, worker: str, response: aiohttp.ClientResponse) -> LegFailed:
        try:
            raw = await self.read_all(worker, response)
        finally:
            response.close()
        try:
            failure = failure_in(json.loads(raw))
        except ValueError:
            failure = None
        message = failure.message if failure is not None else f"HTTP {response.status}"
        return refused(worker, Failure(response.status, message))
