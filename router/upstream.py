"""One request to one worker: send it, read its answer, say in one way what went wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from enum import StrEnum

import aiohttp

from router.answer import failure_in

log = logging.getLogger(__name__)

CONNECT_S = 5.0
ABORT_S = 2.0
"""An abort that the worker has not taken by then is given up: it will see the closed connection."""
IDLE_S = 2.0
"""Connections are kept shorter than a worker keeps them (5 s), or it would close one just as it is used."""
MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""Bound on an answer that comes in one piece."""
READ_BYTES = 64 * 1024


class Fault(StrEnum):
    """What a worker did wrong."""

    UNREACHABLE = "unreachable"
    """No connection, so it did not see the request."""
    REFUSED = "refused"
    """It answered with an error."""
    BROKEN = "broken"
    """Its answer stopped, was empty or makes no sense."""
    TIMEOUT = "timeout"
    LOST = "lost"
    """Its lease ran out, or it was started anew, meanwhile."""


class LegFailed(Exception):
    """A worker did not do its part.

    status   what the client is told: 400 to 499 where the request is to blame, else 502, 503 or 504
    message  for the client; may quote the request where the engine does
    """

    def __init__(self, worker: str, fault: Fault, message: str, status: int = 502) -> None:
        super().__init__(f"{worker}: {fault}")
        self.worker = worker
        self.fault = fault
        self.message = message
        self.status = status
        self.told = False
        """Whether the client has read of it in the worker's own stream."""

    @property
    def client_to_blame(self) -> bool:
        return self.status < 500


class Upstream:
    """Connections to all workers. Deadlines of whole requests are the caller's."""

    def __init__(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            auto_decompress=False,
            headers={"accept-encoding": "identity", "content-type": "application/json"},
            read_bufsize=READ_BYTES,
        )

    async def close(self) -> None:
        await self._session.close()

    async def open(self, worker: str, url: str, body: bytes) -> aiohttp.ClientResponse:
        """An answer whose status is 200, its body unread. Raises LegFailed."""
        try:
            response = await self._session.post(url, data=body)
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
        return refused(worker, response.status, message)


def refused(worker: str, status: int, message: str) -> LegFailed:
    """A worker's error as the client gets it: its own mistakes as they are, ours as a bad gateway."""
    if 400 <= status < 500 and status not in (401, 403, 404):
        return LegFailed(worker, Fault.REFUSED, message, status)
    return LegFailed(worker, Fault.REFUSED, f"{worker}: {message}", 503 if status == 503 else 502)
