"""Other policies beside the live one, on the same requests and without any traffic.

Each shadow has workers on paper (`router.paper_fleet`) as large as the real ones, and chooses by
what it would have placed there itself. Its hit rate and balance say what the cluster would have
had under it; the live policy can be a shadow too, which tells how far paper is from truth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from router.config import RouterSection
from router.cost import CostModel
from router.paper_fleet import PaperFleet
from router.policies import make_policy
from router.policy import Ask, PrefillView


class Shadows:
    """The policies that `router.shadow_policies` names."""

    def __init__(self, section: RouterSection, model: CostModel) -> None:
        self._fleets = [
            PaperFleet(make_policy(name, section.cost, section.seed), model, section.request_timeout_s)
            for name in section.shadow_policies
        ]

    def __iter__(self) -> Iterator[PaperFleet]:
        return iter(self._fleets)

    def observe(self, ask: Ask, prefills: Sequence[PrefillView]) -> None:
        """One request, and the workers that could have prefilled it. Prompts that nobody could read are left out."""
        if not self._fleets or not ask.ids:
            return
        capacities = {view.name: view.capacity_tokens for view in prefills}
        for fleet in self._fleets:
            fleet.place(ask, capacities)

    def lost(self, worker: str) -> None:
        """The worker is gone or begins a new life."""
        for fleet in self._fleets:
            fleet.lost(worker)
