"""When the layers of one process's forward passes are computed, as events of its GPU (transfer/computed.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transfer.computed import Computed

PASSES = 4
"""Sets of events, taken in turn: a pass may begin while the pages of the one before it wait to leave."""


class ForwardPasses:
    """Records when the layers of one process's forward passes are computed. For the scheduler's thread.

    sets     events, one for each layer; as many sets as are taken in turn
    record   puts an event into a stream
    current  the stream into which the calling thread puts its work
    """

    def __init__(
        self, sets: Sequence[Sequence[Any]], record: Callable[[Any, Any], None], current: Callable[[], Any]
    ) -> None:
        self._sets = sets
        self._record = record
        self._current = current
        self._number = 0
        self._stream: Any = None
        self._done: list[Any] = []
        """The events of this pass's first layers."""

    def begin(self, stream: Any) -> None:
        """All of this pass is put into this stream."""
        self._stream, self._done = stream, []
        self._number += 1

    def reaches(self, layer: int) -> None:
        """The layers before this one are in the pool once the calling thread's stream comes here.

        A layer that is put into another stream says nothing, and neither does one that comes again.
        """
        events = self._events
        if len(self._done) < layer < len(events) and self._current() == self._stream:
            self._record(events[layer - 1], self._stream)
            self._done += [events[layer - 1]] * (layer - len(self._done))

    def end(self) -> Computed:
        """All of it has been put into its stream."""
        events = self._events
        self._record(events[-1], self._stream)
        return Computed((*self._done, *[events[-1]] * (len(events) - len(self._done))))

    @property
    def _events(self) -> Sequence[Any]:
        return self._sets[self._number % len(self._sets)]
