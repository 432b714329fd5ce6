"""When a forward pass's layers are in the pool: events that the computing stream has recorded.

Recorded, all of them, before a stream that copies is told to wait. One that waits for what nobody has put into a stream
yet can stop the whole GPU: streams share a few queues (SGLang asks for 8), and loading a kernel waits for every stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transfer.mark import Mark


@dataclass(frozen=True)
class Computed:
    """One forward pass, all of which has been put into its stream. The events are CUDA's.

    A later pass may record the same events again: who waits then waits for that, which is longer than needed and never
    too short.
    """

    before: Any
    """All that the passes before it computed is in the pool."""
    done: Any
    """All that it computes is."""
    nearly: Any = None
    """Its first `layers` layers are; None where nothing is known of a layer before all of them are computed."""
    layers: int = 0
    soon: Mark | None = None
    """Reached shortly before it is done: what is granted until then goes ahead too. None: what is by now. As the
    events, it may come to be a later pass's: then there is nothing left to go ahead."""
