"""Policies by the names that a cluster file and a replay give them."""

from __future__ import annotations

from router.baselines.catalog import BASELINES
from router.config import CostConfig
from router.pair_cost import PairCost
from router.policy import Policy

POLICIES = (PairCost.name, *BASELINES)
"""Ours first."""


def make_policy(name: str, cost: CostConfig, seed: int) -> Policy:
    """A policy that has seen nothing yet. Raises ValueError for a name that is none."""
    if name == PairCost.name:
        return PairCost(cost, seed)
    if name not in BASELINES:
        raise ValueError(f"policy: wanted one of {', '.join(POLICIES)}, found {name!r}")
    return BASELINES[name](seed)
