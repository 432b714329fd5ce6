"""Of requests that come at once, one is on its way to its workers before the next one is read.

A worker that has nothing to do would wait until all were read. So the next request's turn comes some turns of the event
loop after this one's, in which it is sent.
"""

from __future__ import annotations

import asyncio

SENDING_TURNS = 3
"""Of the event loop."""
MOST_IN_ORDER = 16
"""When so many wait, no more do: order is for workers that have nothing to do, not for a router that has too much."""


class Intake:
    """For one event loop."""

    def __init__(self) -> None:
        self._next = asyncio.Lock()
        self._waiting = 0

    async def turn(self) -> None:
        """Returns when a request may be read."""
        if self._waiting >= MOST_IN_ORDER:
            return
        self._waiting += 1
        try:
            await self._next.acquire()
        finally:
            self._waiting -= 1
        self._let_go(SENDING_TURNS)

    def _let_go(self, turns: int) -> None:
        if turns:
            asyncio.get_running_loop().call_soon(self._let_go, turns - 1)
        else:
            self._next.release()
