"""When one process's forward passes are computed, as events of its GPU (transfer/computed.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transfer.computed import Computed
from transfer.mark import Mark

PASSES = 4
"""Sets of events, taken in turn: a pass may begin while the pages of the one before it wait to leave."""


@dataclass(frozen=True)
class Events:
    """Of one pass, as `Computed` has them. `nearly`: all layers but the last one are. Where layers are not told apart
    it only says that the last one has begun, about.

    Not each when it is computed: a link that is kept busy all the time slows down what is computed (measured, see
    transfer/README.md), and in the time of the last layer most of the others are over it.
    """

    before: Any
    nearly: Any
    done: Any


class ForwardPasses:
    """Records how far one process's forward passes are. For the scheduler's thread.

    layers   of the pool, which a pass fills one after the other
    sets     events, taken in turn
    record   puts an event into a stream
    current  the stream into which the calling thread puts its work
    mark     what says whether an event is reached
    apart    whether what the first layers compute is told apart from the rest
    """

    def __init__(
        self,
        layers: int,
        sets: Sequence[Events],
        record: Callable[[Any, Any], None],
        current: Callable[[], Any],
        mark: Callable[[Any], Mark],
        *,
        apart: bool,
    ) -> None:
        self._layers = layers
        self._nearly = layers - 1
        self._sets = sets
        self._record = record
        self._current = current
        self._mark = mark
        self._apart = apart
        self._number = 0
        self._stream: Any = None
        self._layer = -1
        """The last one that was reached."""
        self._in_order = True
        self._told = False
        """Whether `nearly` is this pass's."""

    def begin(self, stream: Any) -> None:
        """All of this pass is put into this stream."""
        self._stream, self._layer, self._in_order, self._told = stream, -1, True, False
        self._number += 1
        self._record(self._events.before, stream)

    def reaches(self, layer: int) -> None:
        """The layers before this one are in the pool once the calling thread's stream comes here.

        Only where they come one after the other, the first one first. Where one is left out, put into another stream or
        comes once more after a later one, nothing is known of a layer before the pass is over.
        """
        if not self._apart:
            if layer == self._nearly:
                self._tell_nearly()
            return
        if layer == self._layer or not self._in_order:
            return
        self._in_order = layer == self._layer + 1 and self._current() == self._stream
        if not self._in_order or not layer < self._layers:
            return
        self._layer = layer
        if layer and layer == self._nearly:
            self._tell_nearly()

    def _tell_nearly(self) -> None:
        self._record(self._events.nearly, self._stream)
        self._told = True

    def end(self) -> Computed:
        """All of it has been put into its stream."""
        events = self._events
        self._record(events.done, self._stream)
        soon = self._mark(events.nearly) if self._told else None
        if not self._in_order or not 0 < self._nearly <= self._layer:
            return Computed(events.before, events.done, soon=soon)
        return Computed(events.before, events.done, events.nearly, self._nearly, soon)

    @property
    def _events(self) -> Events:
        return self._sets[self._number % len(self._sets)]
