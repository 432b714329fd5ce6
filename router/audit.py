"""Is the index right? Each worker says every few seconds which pages of a sample it holds; here that is compared.

    worker ── Audit(sequence, modulus, residue, ids) ──┐
                                                       v
    index ── the same sample of that worker ──────> Audits ──> agreement, and whether to ask for everything again

An audit stands in the stream of batches, so a feed that has applied all before it
must agree page for page. Where it does not, an event was wrong or the index is, and
following on would never mend it: the worker's pages are taken anew. A worker that
cannot be brought to agree is asked less and less often.

Pure: no sockets, no clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

FIRST_HEAL_S = 5.0
"""A worker that was healed and is wrong again is healed again after this long, then after twice that, and so on."""
LONGEST_HEAL_S = 300.0
MAX_AUDITED = 4096
"""Workers whose sums are kept; of more, the one that came first is dropped."""


@dataclass(slots=True)
class Audited:
    """What the audits of one worker came to, over all its epochs."""

    audits: int = 0
    """Samples that were compared."""
    refuted: int = 0
    """Those in which pages differed that should not."""
    heals: int = 0
    """Times that everything was asked for again because of that."""
    agreement: float = 1.0
    """Pages that both sides named in the last sample, of those that either did."""
    trusted: bool = True
    """False from an audit that refuted the index to one that agrees."""
    next_heal_s: float = 0.0
    wait_s: float = FIRST_HEAL_S


class Audits:
    """The audits of all workers, by name."""

    def __init__(self) -> None:
        self._audited: dict[str, Audited] = {}

    def __iter__(self) -> Iterator[tuple[str, Audited]]:
        return iter(self._audited.items())

    def __getitem__(self, worker: str) -> Audited:
        """A worker that was never audited has sums of nothing."""
        return self._audited.get(worker) or Audited()

    def began(self, worker: str) -> None:
        """The worker is followed from nothing, in this epoch or another: what was wrong before is gone."""
        if worker in self._audited:
            self._audited[worker].trusted = True

    def compared(self, worker: str, held: set[int], known: set[int], room: bool, now_s: float) -> bool:
        """Takes a sample in. True where everything should be asked for again.

        held      pages of the sample that the worker holds
        known     pages of the sample that the index has for it, after the same batch
        room      whether the index has room for all of the worker's pages; else it may lack some and is not wrong
        now_s     seconds of a steady clock
        """
        audited = self._at(worker)
        audited.audits += 1
        audited.agreement = len(held & known) / len(held | known) if held or known else 1.0
        # A page too many is wrong in any index, a page too few only in one that can take all.
        if not known - held and not (room and held - known):
            if known == held:
                audited.trusted, audited.next_heal_s, audited.wait_s = True, 0.0, FIRST_HEAL_S
            return False
        audited.trusted = False
        audited.refuted += 1
        if now_s < audited.next_heal_s:
            return False
        audited.next_heal_s, audited.wait_s = now_s + audited.wait_s, min(LONGEST_HEAL_S, 2 * audited.wait_s)
        audited.heals += 1
        return True

    def _at(self, worker: str) -> Audited:
        if worker not in self._audited:
            if len(self._audited) >= MAX_AUDITED:
                del self._audited[next(iter(self._audited))]
            self._audited[worker] = Audited()
        return self._audited[worker]
