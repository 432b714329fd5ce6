"""Consistent hashing: a key belongs to the next point on a ring, and every worker has many points.

A worker that comes or goes moves only the keys next to its points.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence

from router.baselines.order import chance

POINTS = 150
"""A worker. More are more even: with 150, the largest of 8 shares is about a seventh above the mean."""


class HashRing:
    """The ring of these workers; at least one."""

    def __init__(self, names: Sequence[str], seed: int) -> None:
        ring = sorted((chance(seed, point, name), name) for name in names for point in range(POINTS))
        self._places = [place for place, _ in ring]
        self._names = [name for _, name in ring]

    def owner(self, key: int) -> str:
        """The worker that has this key, a hash of 64 bits."""
        return self._names[bisect(self._places, key) % len(self._names)]
