"""A lull: a moment in which no tokens pass. What holds the router up for some tenths of a millisecond is done then.

    streams   tokens |           tokens |           tokens
    a body           | read                                      not while others' tokens come one after the other

The streams of a decode worker speak together, a step at a time, and are silent for milliseconds in between. Where the
steps of many workers leave no time free, nobody waits for it longer than PATIENCE_S.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

SILENT_S = 0.3e-3
"""A step's tokens are less than that apart."""
LOOK_S = 1e-3
"""Between two looks."""
PATIENCE_S = 3e-3


class Lull:
    """Of one event loop."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._passed_s = -SILENT_S

    def passed(self) -> None:
        """Tokens have passed."""
        self._passed_s = self._clock_s()

    async def come(self) -> None:
        """Returns in a lull, or when it was waited for long enough."""
        until_s = self._clock_s() + PATIENCE_S
        while self._clock_s() - self._passed_s < SILENT_S and self._clock_s() < until_s:
            await asyncio.sleep(LOOK_S)
