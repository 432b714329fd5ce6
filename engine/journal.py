"""What a worker's cache holds, and what it said about it: enough to bring any router up to date.

    apply(events)   -> Batch            numbered, to be published
    answer(request) -> Batch… CaughtUp  where the gap is still in memory
                    -> Snapshot… CaughtUp  everything, parents before children, where it is not
    audit(turn)     -> Audit            a sample of what is held, for a router to compare with

Pure: no sockets, no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from transfer.wire import (
    Audit,
    Batch,
    CaughtUp,
    Cleared,
    PageEvent,
    PageMessage,
    PageRequest,
    Removed,
    Snapshot,
    Stored,
    Tier,
)

REMEMBERED_BATCHES = 4096
SNAPSHOT_PART_PAGES = 8192
"""Pages in one part of a snapshot: about 100 kB on the wire."""
AUDITED_PAGES = 256
"""Pages in an audit, about: where one page in a hundred is wrong, it shows in nine of ten cases."""


class Journal:
    """One life of one worker's cache.

    worker, epoch  who it is
    held           page id -> (parent id, depth, tiers as bits); a page is held while it lies in any tier
    """

    def __init__(self, worker: str, epoch: int) -> None:
        self.worker = worker
        self.epoch = epoch
        self.sequence = 0
        self.held: dict[int, tuple[int, int, int]] = {}
        self._recent: deque[Batch] = deque(maxlen=REMEMBERED_BATCHES)

    def apply(self, events: list[PageEvent]) -> Batch:
        """Takes these events in, and gives them the next number."""
        for event in events:
            self._apply(event)
        self.sequence += 1
        batch = Batch(self.worker, self.epoch, self.sequence, events)
        self._recent.append(batch)
        return batch

    def answer(self, request: PageRequest) -> Iterator[PageMessage]:
        """Whatever brings a router that stands where `request` says to `sequence`."""
        if request.epoch == self.epoch and self._remembers(request.sequence + 1):
            yield from (batch for batch in self._recent if batch.sequence > request.sequence)
        else:
            yield from self._snapshot()
        yield CaughtUp(self.worker, self.epoch, self.sequence)

    def audit(self, turn: int) -> Audit:
        """The pages of one class of ids, as of now; audits with turns that follow each other visit all classes."""
        modulus = max(1, len(self.held) // AUDITED_PAGES)
        residue = turn % modulus
        ids = [page for page in self.held if page % modulus == residue]
        return Audit(self.worker, self.epoch, self.sequence, modulus, residue, ids, len(self.held))

    def _apply(self, event: PageEvent) -> None:
        match event:
            case Stored(parent, depth, ids, tier):
                for offset, page in enumerate(ids):
                    tiers = self.held[page][2] if page in self.held else 0
                    self.held[page] = (parent, depth + offset, tiers | 1 << tier)
                    parent = page
            case Removed(ids, tier):
                for page in ids:
                    if page in self.held:
                        parent, depth, tiers = self.held.pop(page)
                        if tiers & ~(1 << tier):
                            self.held[page] = (parent, depth, tiers & ~(1 << tier))
            case Cleared():
                self.held.clear()

    def _remembers(self, sequence: int) -> bool:
        if sequence > self.sequence:
            return sequence == self.sequence + 1
        return bool(self._recent) and self._recent[0].sequence <= sequence

    def _snapshot(self) -> Iterator[Snapshot]:
        part: list[Stored] = []
        index = pages = 0
        for run in _runs(self.held):
            part.append(run)
            pages += len(run.ids)
            if pages >= SNAPSHOT_PART_PAGES:
                yield Snapshot(self.worker, self.epoch, index, part)
                part, pages, index = [], 0, index + 1
        if part or index == 0:
            yield Snapshot(self.worker, self.epoch, index, part)


def _runs(held: dict[int, tuple[int, int, int]]) -> Iterator[Stored]:
    """The pages in order of depth, tier by tier, neighbours of one chain joined where they follow each other."""
    by_depth = sorted(held.items(), key=lambda item: item[1][1])
    for tier in Tier:
        run: Stored | None = None
        for page, (parent, depth, tiers) in by_depth:
            if not tiers & 1 << tier:
                continue
            if run is not None and run.ids[-1] == parent and len(run.ids) < SNAPSHOT_PART_PAGES:
                run.ids.append(page)
                continue
            if run is not None:
                yield run
            run = Stored(parent, depth, [page], tier)
        if run is not None:
            yield run
