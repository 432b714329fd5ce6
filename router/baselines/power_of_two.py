"""Of two workers drawn by chance, the one with the lesser load, counted as in `least_load`."""

from __future__ import annotations

from heapq import nsmallest
from typing import TYPE_CHECKING

from router.baselines.order import chance, token_load
from router.policy import Ask, Pick, Policy

if TYPE_CHECKING:
    from router.pairs import Pairs


class PowerOfTwo(Policy):
    """Nearly as even as looking at all, and no herd where several routers see the same old loads."""

    name = "power_of_two"

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def choose(self, ask: Ask, pairs: Pairs) -> Pick:
        drawn = nsmallest(2, pairs.prefills, key=lambda view: chance(self._seed, ask.number, view.name))
        prefill = min(drawn, key=token_load)
        return Pick(prefill, pairs.idlest_partner(prefill), f"the lesser of {' and '.join(v.name for v in drawn)}")
