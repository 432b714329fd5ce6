"""The worker with the fewest uncached tokens outstanding, then the fewest requests, then by chance.

Stronger than what most routers call least load: they count requests, however long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.baselines.order import chance, token_load
from router.policy import Ask, Pick, Policy

if TYPE_CHECKING:
    from router.pairs import Pairs


class LeastLoad(Policy):
    """Blind to caches, but for their effect on the load."""

    name = "least_load"

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def choose(self, ask: Ask, pairs: Pairs) -> Pick:
        prefill = min(pairs.prefills, key=lambda view: (token_load(view), chance(self._seed, ask.number, view.name)))
        return Pick(prefill, pairs.idlest_partner(prefill), f"least load: {prefill.outstanding_tokens} tokens")
