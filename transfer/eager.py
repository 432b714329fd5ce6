"""A transport that writes ahead whatever is in a page at that time, for tests of what a sender does about it later.

Wraps another one whose writes are in place when they return, and whose landings count nothing (shm).
"""

from __future__ import annotations

import asyncio
import threading

from transfer.computed import Computed
from transfer.layout import PoolLayout
from transfer.plan import Pages
from transfer.transport import Ahead, Landing, Lanes, Route, Transport, Wire

_LOOK_S = 0.001


class EagerTransport:
    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.confirmed_pages = 0
        self.written_pages = 0
        """Not ahead."""
        self.ahead_writes: list[int] = []
        """Pages of each."""
        self.again_pages = 0
        self.settlings = 0
        """How often somebody waited for what was begun."""
        self.computed = threading.Event()
        """Cleared by who wants that it is still under way."""
        self.computed.set()

    @property
    def name(self) -> str:
        return self._inner.name

    async def land(self, wire: Wire) -> Landing:
        return await self._inner.land(wire)

    async def connect(self, description: bytes, layout: PoolLayout, lanes: Lanes) -> Route:
        return _EagerRoute(self, await self._inner.connect(description, layout, lanes))


class _EagerRoute:
    def __init__(self, transport: EagerTransport, inner: Route) -> None:
        self._transport = transport
        self._inner = inner
        self.landing_is_polled = inner.landing_is_polled
        self.slice_bytes = inner.slice_bytes

    @property
    def ahead(self) -> Ahead:
        return self

    async def write(self, tag: int, first: int, source: Pages, destination: Pages) -> None:
        self._transport.written_pages += len(source)
        await self._inner.write(tag, first, source, destination)

    async def write_ahead(self, source: Pages, destination: Pages, fresh: int, computed: Computed) -> None:
        self._transport.ahead_writes.append(len(source))
        await self._inner.write(0, 0, source, destination)

    async def write_again(self, tag: int, first: int, source: Pages, destination: Pages) -> None:
        self._transport.again_pages += len(source)
        await self._inner.write(tag, first, source, destination)

    async def confirm(self, tag: int, pages: int) -> None:
        self._transport.confirmed_pages += pages

    async def settled(self) -> None:
        self._transport.settlings += 1
        while not self._transport.computed.is_set():
            await asyncio.sleep(_LOOK_S)
        await self._inner.settled()

    async def disconnect(self) -> None:
        await self._inner.disconnect()
