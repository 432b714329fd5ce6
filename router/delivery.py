"""What the client of one request has got, over all attempts: its status, the bytes so far, the tokens that they are."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from router.client import Client
from router.openai import ApiError
from router.token_stream import Continuation

TELL_S = 2.0
"""Who is told of an error and does not read is not waited for."""
JSON = {"content-type": "application/json"}


class Delivery:
    """headers  of ours, which may change until the answer begins"""

    def __init__(self, client: Client, headers: dict[str, str]) -> None:
        self.headers = headers
        self.ids: list[int] = []
        """Tokens that the client has, of parts that were cut off."""
        self.begun = False
        """Whether the client has anything of its answer."""
        self._client = client
        self._id = b""
        """What the client has read as the stream's id."""

    def continuation(self, rid: str) -> Continuation | None:
        """What the next part of the stream has to say otherwise; None for the first part."""
        if self.begun:
            return Continuation(self._id, rid.encode(), len(self.ids))
        self._id = rid.encode()
        return None

    async def write(self, piece: bytes, headers: Mapping[str, str]) -> None:
        """A piece of a stream."""
        if not self._client.started:
            own = {"cache-control": "no-cache", **self.headers}
            await self._client.start(200, {**_content_type(headers), **own})
        await self._client.write(piece)
        self.begun = True

    async def end(self, piece: bytes, headers: Mapping[str, str]) -> None:
        """The last piece of a stream, or b""."""
        if piece or not self._client.started:
            await self.write(piece, headers)
        await self._client.end()

    async def answer(self, body: bytes, headers: Mapping[str, str]) -> None:
        """A whole answer."""
        await self._client.answer(200, body, {**_content_type(headers), **self.headers})

    async def fail(self, error: ApiError) -> bool:
        """Ends the answer with an error. Whether the client has read it."""
        try:
            async with asyncio.timeout(TELL_S):
                if self._client.started:
                    await self._client.write(error.event())
                    await self._client.end()
                else:
                    await self._client.answer(error.status, error.body(), {**JSON, **self.headers, **error.headers})
        except TimeoutError:
            return False
        return True


def _content_type(headers: Mapping[str, str]) -> dict[str, str]:
    return {"content-type": headers.get("content-type", "application/json")}
