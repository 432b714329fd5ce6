"""One worker's pages in the index: what it publishes is applied, and compared with what it says it holds.

    Batch, answers ──> Sequence ──> Step ──> Mirror.apply ──> Index
    Audit ───────────────────────────────> Mirror.compared ──> Audits, and whether to ask for everything again

Whoever carries the messages, over sockets or in virtual time, asks what a `Step` wants to be asked.
"""

from __future__ import annotations

from collections.abc import Iterable

from router.audit import Audits
from router.fleet import FeedMode
from router.index import Index
from router.sequence import Sequence, Step
from transfer.wire import Audit, Cleared, PageEvent, Removed, Stored

ROOM = 0.9
"""An index that is filled no further than this has dropped nothing for want of room."""


class Mirror:
    """Begins with nothing, in this epoch of the worker."""

    def __init__(self, worker: str, epoch: int, index: Index, audits: Audits) -> None:
        self.worker = worker
        self.sequence = Sequence(epoch)
        self._index = index
        self._audits = audits
        audits.began(worker)

    def mode(self, now_s: float) -> FeedMode:
        """What the pages that the index has of the worker are worth."""
        mode = self.sequence.mode(now_s)
        sound = self._index.complete(self.worker) and self._audits[self.worker].trusted
        return FeedMode.APPROXIMATE if mode is FeedMode.EXACT and not sound else mode

    def apply(self, events: Iterable[PageEvent]) -> None:
        """Takes the events of a step into the index."""
        for event in events:
            match event:
                case Stored():
                    self._index.stored(self.worker, event.parent, event.depth, event.ids, event.tier)
                case Removed():
                    self._index.removed(self.worker, event.ids, event.tier)
                case Cleared():
                    self._index.cleared(self.worker)

    def compared(self, audit: Audit, now_s: float) -> Step:
        """Looks at an audit that stands where the sequence does; asks for everything where the index is wrong."""
        known = self._index.sample(self.worker, audit.modulus, audit.residue)
        # Pages that found no room are missing rightly. So are none while there is some: those came in disorder, or
        # after a page that was dropped by mistake.
        room = self._index.complete(self.worker) or self._index.fill < ROOM
        heal = self._audits.compared(self.worker, set(audit.ids), known, room, now_s)
        return self.sequence.refuted(now_s) if heal else Step()
