"""The client's side of one request, straight on ASGI: body in, bytes out, and whether it is still there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any

from router.openai import MAX_BODY_BYTES, ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

BODY_S = 60.0
"""A body that has not come by then is refused."""


class ClientGone(Exception):
    """The client closed the connection."""


class Client:
    """One request. `body` first, then one of `answer` and `start`; nothing twice."""

    def __init__(self, receive: Receive, send: Send, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        self._receive = receive
        self._send = send
        self._headers = dict(headers)
        self.started = False
        """Whether a status was sent, after which an error can only be an event."""

    def header(self, name: str) -> str:
        """Of the request, by its name in lower case; "" where there is none."""
        return self._headers.get(name.encode("latin-1"), b"").decode("latin-1")

    async def body(self) -> bytes:
        """The whole body. Raises ClientGone, ApiError where it is too long or too slow."""
        try:
            async with asyncio.timeout(BODY_S):
                return await self._read()
        except TimeoutError:
            raise ApiError(408, f"body: wanted within {BODY_S:.0f} s, found a part of it") from None

    async def _read(self) -> bytes:
        pieces = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            pieces += message.get("body", b"")
            if len(pieces) > MAX_BODY_BYTES:
                raise ApiError(413, f"body: wanted at most {MAX_BODY_BYTES} bytes, found more")
            if not message.get("more_body", False):
                return bytes(pieces)

    async def gone(self) -> None:
        """Returns when the client has closed the connection. To be cancelled where that no longer matters."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        """A whole answer at once."""
        await self.start(status, {**headers, "content-length": str(len(body))})
        await self._send({"type": "http.response.body", "body": body})

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        self.started = True
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, piece: bytes) -> None:
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})
