"""One worker's page events in order, without gaps, whatever the network does.

    SUB    ── live batches, audits ──┐
                                     v
    first contact, gap, lag,     Sequence ──> events to apply to the index
    new epoch, silence, ──ask──>     ^   ├──> a request to send
    wrong pages                      │   └──> what the pages are worth: exact, approximate, load-only
    DEALER ── answer ────────────────┘

The subscription is made before the question is asked, so what happens in between is
kept in a buffer, and applied after the answer where the answer does not cover it
already. A gap that was only disorder closes without one. An answer is either the
batches that were missed or a snapshot in parts; `CaughtUp` ends both and says where
they lead. An answer that does not come, or comes with a hole, is asked for again.

Messages and time come in, events and requests go out: no sockets, no clock.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from router.fleet import FeedMode
from transfer.wire import Batch, CaughtUp, Cleared, PageEvent, PageMessage, PageRequest, Snapshot

ANSWER_S = 3.0
"""A question without progress for this long is asked again."""
LAG_S = 1.0
"""Events that the worker says it has sent and that have not come for this long are asked for."""
MISSED_AUDITS = 2
"""A publisher that is silent over so many audits is asked over the other way whether anything was missed."""
CUT_OFF_S = 3.0
"""A worker that was asked and has said nothing for this long is cut off: its pages may be others by now."""
HOLE = -1
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
        self._whole = False
        """Whether all pages of this epoch were known at some time, so that what is applied is worth something."""
        self._asked_s: float | None = None
        self._stuck_since_s = 0.0
        """When the feed stopped being exact, or took a step towards it last. Of no meaning while it is exact."""
        self._heard_s = 0.0
        """When the publisher, or an answer in its place, said something last."""
        self._silence_s = math.inf
        """A publisher that is well says something within this time."""
        self._behind_since_s: float | None = None
        self._announced = 0
        self._buffer: deque[Batch] = deque(maxlen=MAX_BUFFERED)
        self._next_part = 0
        """Index of the snapshot part that comes next; 0 while no snapshot is under way, HOLE after a missing part."""

    def __repr__(self) -> str:
        state = "exact" if self.exact else "catching up"
        return f"Sequence(epoch={self.epoch}, position={self.position}, {state}, buffered={len(self._buffer)})"

    def start(self, now_s: float) -> Step:
        """First contact: asks for everything."""
        return Step(ask=self._ask(now_s))

    def mode(self, now_s: float) -> FeedMode:
        """What the pages that were applied are worth."""
        if self.exact:
            return FeedMode.EXACT
        cut_off = now_s - self._stuck_since_s >= CUT_OFF_S
        return FeedMode.APPROXIMATE if self._whole and not cut_off else FeedMode.LOAD_ONLY

    def announced(self, sequence: int, audit_s: float = 0.0) -> None:
        """A registration said that this is the last sequence published in this epoch. `tick` looks at it.

        audit_s  time between two audits of the worker; 0: it makes none
        """
        self._announced = max(self._announced, sequence)
        self._silence_s = MISSED_AUDITS * audit_s + LAG_S if audit_s > 0 else math.inf

    def tick(self, now_s: float) -> Step:
        """Time has passed."""
        if not self.exact:
            overdue = self._asked_s is not None and now_s - self._asked_s >= ANSWER_S
            return Step(ask=self._ask(now_s)) if overdue else _NOTHING
        if now_s - self._heard_s >= self._silence_s:
            return Step(ask=self._ask(now_s))
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
        self._heard_s = now_s
        if not self.exact:
            return self._disordered(batch, now_s)
        if batch.sequence <= self.position:
            return _NOTHING
        if batch.sequence > self.position + 1:
            self._buffer.append(batch)
            return Step(ask=self._ask(now_s))
        self.position = batch.sequence
        return Step(tuple(batch.events))

    def reached(self, epoch: int, sequence: int, now_s: float) -> Step:
        """The publisher stands at `sequence` here in its stream: what has not come up to there was lost."""
        if epoch < self.epoch:
            return _NOTHING
        if epoch > self.epoch:
            return self._new_epoch(epoch, now_s)
        self._heard_s, self._announced = now_s, max(self._announced, sequence)
        if not self.exact or sequence <= self.position:
            return _NOTHING
        return Step(ask=self._ask(now_s))

    def stands_at(self, epoch: int, sequence: int) -> bool:
        """Whether exactly the batches up to `sequence` are applied."""
        return self.exact and self.epoch == epoch and self.position == sequence

    def refuted(self, now_s: float) -> Step:
        """What was applied is not what the worker holds: asks for everything. Until it comes, the old is kept."""
        self.position = 0
        return Step(ask=self._ask(now_s))

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
        self.position = batch.sequence
        self._progress(now_s)
        return Step(tuple(batch.events))

    def _snapshot_part(self, part: Snapshot, now_s: float) -> Step:
        if part.index != 0 and part.index != self._next_part:
            self._next_part = HOLE
            return _NOTHING
        self._progress(now_s)
        self._next_part = part.index + 1
        # What was applied before is gone with part 0, and where this one leads is known only at its end.
        self.position = 0
        replaced: tuple[PageEvent, ...] = () if part.index else (Cleared(),)
        return Step((*replaced, *part.pages))

    def _caught_up(self, end: CaughtUp, now_s: float) -> Step:
        if self._next_part == HOLE:
            return Step(ask=self._ask(now_s))
        if self._next_part:
            self.position, self._next_part = end.sequence, 0
        elif self.position == 0 or self.position < end.sequence:
            # Without a position everything was asked for, and that comes as a snapshot.
            return Step(ask=self._ask(now_s))
        self._progress(now_s)
        events: list[PageEvent] = []
        whole = self._follow_buffer(events)
        if whole:
            self._become_exact()
        return Step(tuple(events), None if whole else self._ask(now_s))

    def _disordered(self, batch: Batch, now_s: float) -> Step:
        """A batch that comes while an answer is awaited: it may be the missing one, only late."""
        if not self.position or self._next_part or batch.sequence != self.position + 1:
            self._buffer.append(batch)
            return _NOTHING
        events = list(batch.events)
        self.position, self._stuck_since_s = batch.sequence, now_s
        if self._follow_buffer(events):
            self._become_exact()
        return Step(tuple(events))

    def _follow_buffer(self, events: list[PageEvent]) -> bool:
        """Takes what follows `position` without a hole out of the buffer; whether there was no hole."""
        for batch in sorted(self._buffer, key=lambda batch: batch.sequence):
            if batch.sequence == self.position + 1:
                self.position = batch.sequence
                events += batch.events
            elif batch.sequence > self.position:
                return False
        return True

    def _become_exact(self) -> None:
        self._buffer.clear()
        self.exact = self._whole = True
        self._asked_s = self._behind_since_s = None

    def _progress(self, now_s: float) -> None:
        self._asked_s = self._stuck_since_s = self._heard_s = now_s

    def _new_epoch(self, epoch: int, now_s: float, first: Batch | None = None) -> Step:
        self.epoch, self.position, self._announced = epoch, 0, 0
        self._whole = False
        self._buffer.clear()
        if first is not None:
            self._buffer.append(first)
        return Step((Cleared(),), self._ask(now_s))

    def _ask(self, now_s: float) -> PageRequest:
        if self.exact:
            self._stuck_since_s = now_s
        self.exact, self._asked_s, self._next_part = False, now_s, 0
        self._behind_since_s = None
        # Position 0 is a claim about nothing: everything is wanted.
        return PageRequest(self.epoch, self.position) if self.position else PageRequest(0, 0)
