"""A point in what a GPU computes, for those who wait for it without stopping anybody."""

from __future__ import annotations

import asyncio
from typing import Protocol

POLL_S = 0.5e-3
"""Between two looks."""


class Mark(Protocol):
    """A point in what the GPU computes."""

    def reached(self) -> bool:
        """From any thread. Once True, always."""


async def until(mark: Mark) -> None:
    """Returns once it is reached. Whoever waits has a deadline of its own."""
    while not mark.reached():
        await asyncio.sleep(POLL_S)
