"""Prompts that begin alike on one worker, unless it is too busy: a hash ring with bounded load.

The rule is that of smg's `prefix_hash`: the ring's worker for the prompt's beginning, and the one with
the fewest requests where that has more than `load_factor` times the mean, this request included.
smg hashes the first 256 tokens. Here it is 2,048 by default, in whole pages: system prompts alone
are longer than 256, and all their users would be one key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.baselines.hash_ring import HashRing
from router.baselines.least_load import LeastLoad
from router.baselines.order import beginning, chance
from router.policy import Ask, Pick, Policy

if TYPE_CHECKING:
    from router.pairs import Pairs

BEGINNING_TOKENS = 2_048
LOAD_FACTOR = 1.25


class PrefixHash(Policy):
    """Load is requests in flight, as smg counts it. A prompt that is not known goes to the least loaded."""

    name = "prefix_hash"

    def __init__(self, seed: int, beginning_tokens: int = BEGINNING_TOKENS, load_factor: float = LOAD_FACTOR) -> None:
        self._seed = seed
        self._beginning_tokens = beginning_tokens
        self._load_factor = load_factor
        self._least_load = LeastLoad(seed)
        self._names: tuple[str, ...] = ()
        self._ring: HashRing | None = None

    def choose(self, ask: Ask, pairs: Pairs) -> Pick:
        key = beginning(ask, self._beginning_tokens)
        if key is None:
            return self._least_load.choose(ask, pairs)
        owner = self._ring_of(tuple(view.name for view in pairs.prefills)).owner(key)
        prefill = next(view for view in pairs.prefills if view.name == owner)
        total = sum(view.inflight_requests for view in pairs.prefills)
        bound = self._load_factor * (total + 1) / len(pairs.prefills)
        if not total or prefill.inflight_requests <= bound:
            return Pick(prefill, pairs.idlest_partner(prefill), f"hash: the ring gives {key:016x} to it")
        idlest = min(
            pairs.prefills,
            key=lambda view: (view.inflight_requests, chance(self._seed, ask.number, view.name)),
        )
        return Pick(idlest, pairs.idlest_partner(idlest), f"spill: {owner} has more than {bound:.1f} requests")

    def _ring_of(self, names: tuple[str, ...]) -> HashRing:
        if self._ring is None or names != self._names:
            self._names, self._ring = names, HashRing(names, self._seed)
        return self._ring
