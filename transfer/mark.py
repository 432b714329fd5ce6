"""A point in what a GPU computes, for those who wait for it without stopping anybody."""

from __future__ import annotations

from typing import Protocol

POLL_S = 0.5e-3
"""Between two looks."""


class Mark(Protocol):
    """A point in what the GPU computes."""

    def reached(self) -> bool:
        """From any thread. Once True, always."""
