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
        self._layer = -1
        """The last one that was reached."""
        self._in_order = True

    def begin(self, stream: Any) -> None:
        """All of this pass is put into this stream."""
        self._stream, self._done = stream, []
        self._layer, self._in_order = -1, True
        self._number += 1

    def reaches(self, layer: int) -> None:
        """The layers before this one are in the pool once the calling thread's stream comes here.

        Only where they come one after the other, the first one first. From a layer on that is left out, put into
        another stream or comes once more after a later one, nothing is known of a layer before the pass is over.
        """
        if layer == self._layer or not self._in_order:
            return
        self._in_order = layer == self._layer + 1 and self._current() == self._stream
        events = self._events
        if not self._in_order or not layer < len(events):
            return
        self._layer = layer
        if layer:
            self._record(events[layer - 1], self._stream)
            self._done.append(events[layer - 1])

    def end(self) -> Computed:
        """All of it has been put into its stream."""
        events = self._events
        done = self._done if self._in_order else []
        self._record(events[-1], self._stream)
        return Computed((*done, *[events[-1]] * (len(events) - len(done))))

    @property
    def _events(self) -> Sequence[Any]:
        return self._sets[self._number % len(self._sets)]
