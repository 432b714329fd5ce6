"""How long each step of a hand-off may take. Every wait in this package has one of these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Deadlines:
    """All in seconds."""

    connect_s: float = 5.0
    """To reach a prefill worker and finish the handshake."""
    ping_s: float = 0.5
    """Between two signs of life on an idle connection."""
    silence_s: float = 2.5
    """A peer that says nothing for so long, or takes nothing, is lost."""
    queue_s: float = 300.0
    """A request that prefill has, and for which decode has found no pages after so long, fails."""
    handoff_s: float = 60.0
    """From the grant of the pages to the last of them; it spans the prefill worker's queue and its compute."""
    fence_s: float = 10.0
    """From a failure to the peer's word that it writes no more; then the connection is cut instead."""
    memory_s: float = 120.0
    """How long a room is remembered after both it and its request have ended: late messages find their answer."""
