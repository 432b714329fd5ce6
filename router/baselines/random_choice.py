"""Any worker, all alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.baselines.order import chance
from router.policy import Ask, Pick, Policy

if TYPE_CHECKING:
    from router.pairs import Pairs


class RandomChoice(Policy):
    """Uniform, by a hash of seed and request."""

    name = "random"

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def choose(self, ask: Ask, pairs: Pairs) -> Pick:
        prefill = min(pairs.prefills, key=lambda view: chance(self._seed, ask.number, view.name))
        return Pick(prefill, pairs.idlest_partner(prefill), "drawn")
