"""A transport whose writes wait for a word, for tests and fault benchmarks: it makes the worst moment last.

Wraps any other. A held write stops after the first half of its pages, as a slow or frozen
worker's would, and goes on when released.
"""

from __future__ import annotations

import asyncio
import threading

from transfer.layout import PoolLayout
from transfer.plan import Pages
from transfer.transport import Landing, Lanes, Route, Transport, Wire

_LOOK_S = 0.001


class HeldTransport:
    """`hold` and `release` may be called from any thread."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self._free = threading.Event()
        self._free.set()
        self.held = threading.Event()
        """Set while a write waits."""

    @property
    def name(self) -> str:
        return self._inner.name

    def hold(self) -> None:
        self.held.clear()
        self._free.clear()

    def release(self) -> None:
        self._free.set()

    async def land(self, wire: Wire) -> Landing:
        return await self._inner.land(wire)

    async def connect(self, description: bytes, layout: PoolLayout, lanes: Lanes) -> Route:
        return _HeldRoute(await self._inner.connect(description, layout, lanes), self._free, self.held)


class _HeldRoute:
    def __init__(self, inner: Route, free: threading.Event, held: threading.Event) -> None:
        self._inner = inner
        self.landing_is_polled = inner.landing_is_polled
        self.slice_bytes = inner.slice_bytes
        self.ahead = inner.ahead
        self._free = free
        self._held = held

    async def write(self, tag: int, first: int, source: Pages, destination: Pages) -> None:
        half = len(source) // 2 if not self._free.is_set() else 0
        if half:
            await self._inner.write(tag, first, source[:half], destination[:half])
        while not self._free.is_set():
            self._held.set()
            await asyncio.sleep(_LOOK_S)
        await self._inner.write(tag, first + half, source[half:], destination[half:])

    async def settled(self) -> None:
        await self._inner.settled()

    async def disconnect(self) -> None:
        await self._inner.disconnect()
