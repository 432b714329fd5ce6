"""Ends a wait for more of what keeps coming, where nothing has come for too long.

One timer, however many pieces come: one for each takes a fifth of what it takes to pass a token on.
"""

from __future__ import annotations

import asyncio
from types import TracebackType


class Silence:
    """`async with Silence(limit_s)` around all of the waiting, which is told by `waits` and `heard`; leaves with
    TimeoutError where it was waited for so long at a stretch."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._timeout = asyncio.timeout(None)
        self._since_s: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def waits(self) -> None:
        self._since_s = self._loop.time()

    def heard(self) -> None:
        self._since_s = None

    async def __aenter__(self) -> Silence:
        await self._timeout.__aenter__()
        self._timer = self._loop.call_later(self._limit_s, self._look)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._timeout.__aexit__(kind, error, trace)

    def _look(self) -> None:
        now_s = self._loop.time()
        silent_s = 0.0 if self._since_s is None else now_s - self._since_s
        if silent_s < self._limit_s:
            self._timer = self._loop.call_later(self._limit_s - silent_s, self._look)
        else:
            self._timeout.reschedule(now_s)
