"""When each layer of a forward pass is in the pool: events that the computing stream has recorded.

Recorded, all of them, before a stream that copies is told to wait. One that waits for what nobody has put into a stream
yet can stop the whole GPU: streams share a few queues (SGLang asks for 8), and loading a kernel waits for every stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Computed:
    """One forward pass, all of which has been put into its stream."""

    events: tuple[Any, ...]
    """CUDA's, one for each layer in their order: it and those before it are in the pool. A later pass may record the
    same events again: who waits then waits for that, which is longer than needed and never too short."""

    @property
    def together(self) -> bool:
        """Whether nothing is known of a layer before all of them are computed."""
        return self.events[0] is self.events[-1]
