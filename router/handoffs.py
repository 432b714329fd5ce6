"""What was handed over between workers, added up over all of their lives.

Each registration of a decode worker brings its sums since that life of it began. So no sum
depends on how many registrations came; of a worker that is killed, what it had after its last
one is not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from transfer.wire import HandoffTotals

Kind = tuple[str, str, str]
"""Prefill worker, transport, outcome."""


class Handoffs:
    """Sums for each decode worker and each kind of hand-off. They never shrink."""

    def __init__(self) -> None:
        self._past: dict[str, dict[Kind, HandoffTotals]] = {}
        """By decode worker: its lives before the present one."""
        self._present: dict[str, tuple[int, dict[Kind, HandoffTotals]]] = {}

    def registered(self, decode: str, epoch: int, totals: Iterable[HandoffTotals]) -> None:
        """Takes in what the worker said of this epoch. Of an earlier one than the last, all is known already."""
        known_epoch, known = self._present.get(decode, (epoch, {}))
        if epoch < known_epoch:
            return
        if epoch > known_epoch:
            past = self._past.setdefault(decode, {})
            for kind, last in known.items():
                past[kind] = _sum(past[kind], last) if kind in past else last
        self._present[decode] = epoch, {_kind(one): one for one in totals}

    def __iter__(self) -> Iterator[tuple[str, HandoffTotals]]:
        """(decode worker, sums) for each kind."""
        for decode, (_, present) in self._present.items():
            past = self._past.get(decode, {})
            for kind in past | present:
                if kind in past and kind in present:
                    yield decode, _sum(past[kind], present[kind])
                else:
                    yield decode, past[kind] if kind in past else present[kind]


def _kind(totals: HandoffTotals) -> Kind:
    return totals.prefill, totals.transport, totals.outcome


def _sum(first: HandoffTotals, second: HandoffTotals) -> HandoffTotals:
    return msgspec.structs.replace(
        first,
        handoffs=first.handoffs + second.handoffs,
        pages=first.pages + second.pages,
        moved_bytes=first.moved_bytes + second.moved_bytes,
        prefix_tokens=first.prefix_tokens + second.prefix_tokens,
        took_s=first.took_s + second.took_s,
        ahead_pages=first.ahead_pages + second.ahead_pages,
        handover_s=first.handover_s + second.handover_s,
    )
