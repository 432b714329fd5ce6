"""What one hand-off came to, as decode saw it: for counters, and for whoever asks about a request."""

from __future__ import annotations

import msgspec


class Ended(msgspec.Struct, frozen=True, array_like=True):
    """One room, after its end."""

    room: int
    prefill: str
    """The worker; "" where none was reached."""
    transport: str
    pages: int
    """Pages that decode asked for; the ones that it held already are not among them."""
    moved_bytes: int
    """KV that landed. 0 where the hand-off failed."""
    prefix_tokens: int
    """Tokens at the prompt's start that decode held already: they were not moved."""
    took_s: float
    """From the first word of the room to its end."""
    reason: str
    """Why it failed; "" where it did not."""
    writing_s: float = 0.0
    """Of that, the time in which pages were written, and the last ones waited for. 0 where the hand-off failed."""
    ahead_pages: int = 0
    """Of the pages, those that left before they were sent. 0 where the hand-off failed."""
    opening_s: float = 0.0
    """Of took_s, until decode had pages to grant: it connects, and finds room. 0 where the hand-off failed."""
    computing_s: float = 0.0
    """Of took_s, from the grant until prefill had computed the last pages, its queue included. 0 where the hand-off
    failed."""

    @property
    def handover_s(self) -> float:
        """Of took_s, what the hand-off itself took, beside finding pages for it and computing them."""
        return max(0.0, self.took_s - self.opening_s - self.computing_s)
