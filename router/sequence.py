"""One worker's page events in order, without gaps, whatever the network does.

    SUB    ── live batches ──────┐
                                 v
    first contact, gap,      Sequence ──> events to apply to the index
    new epoch, lag ──ask──>      ^   └──> a request to send
    DEALER ── answer ────────────┘

The subscription is made before the question is asked, so what happens in between is
kept in a buffer, and applied after the answer where the answer does not cover it
already. An answer is either the batches that were missed or a snapshot in parts;
`CaughtUp` ends both and says where they lead. An answer that does not come, or comes
with a hole, is asked for again.

Messages and time come in, events and requests go out: no sockets, no clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from transfer.wire import Batch, CaughtUp, Cleared, PageEvent, PageMessage, PageRequest, Snapshot

ANSWER_S = 5.0
"""A question without progress for this long is asked again."""
LAG_S = 1.0
"""Events that the worker says it has sent and that have not come for this long are asked for."""
MAX_BUFFERED = 10_000
"""Live batches kept while an answer is awaited. More push out the oldest, and the hole is asked for later."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one input leads to. `Cleared` among the events: forget what was applied before it."""

    events: tuple[PageEvent, ...] = ()
    ask: PageRequest | None = None


_NOTHING = Step()


class Sequence:
    """The state of one worker's feed. Inputs are the methods; each returns what to do."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.position = 0
        """Sequence of the last batch that was applied."""
        self.exact = False
        """Whether nothing is known to be missing."""
        self._asked_s: float | None = None
        self._behind_since_s: float | None = None
        self._announced = 0
        self._buffer: deque[Batch] = deque(maxlen=MAX_BUFFERED)
        self._next_part = 0
        """Index of the snapshot part that comes next; 0 while no snapshot is under way."""

    def __repr__(self) -> str:
        state = "exact" if self.exact else "catching up"
        return f"Sequence(epoch={self.epoch}, position={self.position}, {state}, buffered={len(self._buffer)})"

    def start(self, now_s: float) -> Step:
        """First contact: asks for everything."""
        return Step(ask=self._ask(now_s))

    def announced(self, sequence: int) -> None:
        """A registration said that this is the last sequence published in this epoch. `tick` looks at it."""
        self._announced = max(self._announced, sequence)

    def tick(self, now_s: float) -> Step:
        """Time has passed."""
        if not self.exact:
            overdue = self._asked_s is not None and now_s - self._asked_s >= ANSWER_S
            return Step(ask=self._ask(now_s)) if overdue else _NOTHING
        if self.position >= self._announced:
            self._behind_since_s = None
        elif self._behind_since_s is None:
            self._behind_since_s = now_s
        elif now_s - self._behind_since_s >= LAG_S:
            return Step(ask=self._ask(now_s))
        return _NOTHING

    def live(self, batch: Batch, now_s: float) -> Step:
        """A batch from the worker's publisher."""
        if batch.epoch < self.epoch:
            return _NOTHING
        if batch.epoch > self.epoch:
            return self._new_epoch(batch.epoch, now_s, batch)
        if not self.exact:
            self._buffer.append(batch)
            return _NOTHING
        if batch.sequence <= self.position:
            return _NOTHING
        if batch.sequence > self.position + 1:
            self._buffer.append(batch)
            return Step(ask=self._ask(now_s))
        self.position = batch.sequence
        return Step(tuple(batch.events))

    def answered(self, message: PageMessage, now_s: float) -> Step:
        """A part of an answer. Parts of answers that are not awaited any more are dropped."""
        if message.epoch > self.epoch:
            return self._new_epoch(message.epoch, now_s)
        if message.epoch < self.epoch or self.exact:
            return _NOTHING
        match message:
            case Batch():
                return self._replayed(message, now_s)
            case Snapshot():
                return self._snapshot_part(message, now_s)
            case CaughtUp():
                return self._caught_up(message, now_s)

    def _replayed(self, batch: Batch, now_s: float) -> Step:
        if self._next_part or batch.sequence != self.position + 1:
            return _NOTHING
        self.position, self._asked_s = batch.sequence, now_s
        return Step(tuple(batch.events))

    def _snapshot_part(self, part: Snapshot, now_s: float) -> Step:
        if part.index != 0 and part.index != self._next_part:
            return _NOTHING
        self._asked_s = now_s
        self._next_part = part.index + 1
        # What was applied before is gone with part 0, and where this one leads is known only at its end.
        self.position = 0
        replaced: tuple[PageEvent, ...] = () if part.index else (Cleared(),)
        return Step((*replaced, *part.pages))

    def _caught_up(self, end: CaughtUp, now_s: float) -> Step:
        if self._next_part:
            self.position, self._next_part = end.sequence, 0
        elif self.position != end.sequence:
            return Step(ask=self._ask(now_s))
        events: list[PageEvent] = []
        for batch in sorted(self._buffer, key=lambda batch: batch.sequence):
            if batch.sequence == self.position + 1:
                self.position = batch.sequence
                events += batch.events
            elif batch.sequence > self.position:
                return Step(tuple(events), self._ask(now_s))
        self._buffer.clear()
        self.exact, self._asked_s, self._behind_since_s = True, None, None
        return Step(tuple(events))

    def _new_epoch(self, epoch: int, now_s: float, first: Batch | None = None) -> Step:
        self.epoch, self.position, self._announced = epoch, 0, 0
        self._buffer.clear()
        if first is not None:
            self._buffer.append(first)
        return Step((Cleared(),), self._ask(now_s))

    def _ask(self, now_s: float) -> PageRequest:
        self.exact, self._asked_s, self._next_part = False, now_s, 0
        self._behind_since_s = None
        # Position 0 is a claim about nothing: everything is wanted.
        return PageRequest(self.epoch, self.position) if self.position else PageRequest(0, 0)
