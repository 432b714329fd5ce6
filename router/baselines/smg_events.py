"""`cache_aware` as smg 1.13 has it where it knows KV events (its gRPC workers), with its spill gate.

    no overlap   -> the fewest requests in flight, then the fewest processed, then the first
    else         -> the largest (overlap, -load), but the least loaded where for the chosen one
                    load > mean + min(64, max(4, 2 sqrt(mean)))  and  load > 1.5 mean

smg breaks ties of overlap and load by the size of the worker's tree; a policy here is not told that,
and the count of requests processed stands in for it. Left out are its safety nets, which look at
the engines' metrics (8 waiting requests, 0.8 of the KV used), and its warm-up of new workers.
"""

from __future__ import annotations

from collections import Counter
from math import sqrt
from typing import TYPE_CHECKING

from router.policy import Ask, Pick, Policy, PrefillView

if TYPE_CHECKING:
    from router.pairs import Pairs

BALANCE_ABS_THRESHOLD = 64
BALANCE_REL_THRESHOLD = 1.5
LEAST_MARGIN = 4.0
"""Requests above the mean that are never too many."""
DEVIATIONS = 2.0


class SmgCacheAwareEvents(Policy):
    """The arguments are smg's options of the same names."""

    name = "smg_cache_aware_events"

    def __init__(
        self,
        seed: int,
        balance_abs_threshold: int = BALANCE_ABS_THRESHOLD,
        balance_rel_threshold: float = BALANCE_REL_THRESHOLD,
    ) -> None:
        self._balance_abs_threshold = balance_abs_threshold
        self._balance_rel_threshold = balance_rel_threshold
        self._processed: Counter[str] = Counter()

    def choose(self, ask: Ask, pairs: Pairs) -> Pick:
        # `min` takes the first of equals, which is smg's last tie break.
        idlest = min(pairs.prefills, key=self._load)
        holder = min(pairs.prefills, key=lambda view: (-view.held_pages, self._load(view)))
        if not holder.held_pages:
            return Pick(idlest, pairs.idlest_partner(idlest), "no overlap: least loaded")
        mean = sum(view.inflight_requests for view in pairs.prefills) / len(pairs.prefills)
        if self._spills(holder.inflight_requests, mean):
            reason = f"spilled: {holder.name} has {holder.inflight_requests} requests, the mean is {mean:.1f}"
            return Pick(idlest, pairs.idlest_partner(idlest), reason)
        return Pick(holder, pairs.idlest_partner(holder), f"overlap of {holder.held_pages} pages")

    def sent(self, ask: Ask, prefill: str, decode: str) -> None:
        self._processed[prefill] += 1

    def lost(self, worker: str) -> None:
        del self._processed[worker]

    def _load(self, view: PrefillView) -> tuple[int, int]:
        return view.inflight_requests, self._processed[view.name]

    def _spills(self, load: int, mean: float) -> bool:
        margin = min(self._balance_abs_threshold, max(LEAST_MARGIN, DEVIATIONS * sqrt(mean)))
        return load > mean + margin and load > self._balance_rel_threshold * mean
