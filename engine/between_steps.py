"""Work that holds up an event loop, in between two steps of an engine: behind a step's tokens, which it would keep.

    step n            step n+1          step n+2
    tokens | work     tokens |          tokens | work

One piece of work a step, in the order in which it came. A loop that passes no tokens on keeps nobody waiting.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

RUNNING_S = 0.1
"""Tokens came within that time: more will."""
PATIENCE_S = 0.05
"""Work waits for its step no longer than that."""
TURNS = 4
"""Of the loop, after which a step's tokens are on their way: they come by a task for each request."""


class BetweenSteps:
    """For one event loop."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._stepped_s = -RUNNING_S
        self._waiting: deque[asyncio.Future[None]] = deque()

    def stepped(self, *, goes_on: bool) -> None:
        """The tokens of a step are about to be passed on. goes_on: more will come"""
        self._stepped_s = self._clock_s() if goes_on else -RUNNING_S
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                if goes_on:
                    return

    async def place(self) -> bool:
        """Returns when there is time for a piece of work that holds the loop up; whether that was later."""
        if self._clock_s() - self._stepped_s >= RUNNING_S:
            return False
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await place
        except TimeoutError:
            return True
        for _ in range(TURNS):
            await asyncio.sleep(0)
        return True
