"""Each worker in its turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.policy import Ask, Pick, Policy

if TYPE_CHECKING:
    from router.pairs import Pairs


class RoundRobin(Policy):
    """The turn passes when a request is sent, so asking twice changes nothing."""

    name = "round_robin"

    def __init__(self, seed: int) -> None:
        self._turn = 0

    def choose(self, ask: Ask, pairs: Pairs) -> Pick:
        prefill = pairs.prefills[self._turn % len(pairs.prefills)]
        return Pick(prefill, pairs.idlest_partner(prefill), f"turn {self._turn}")

    def sent(self, ask: Ask, prefill: str, decode: str) -> None:
        self._turn += 1
