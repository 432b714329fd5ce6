"""How many attempts may follow failed ones, over all requests: a cluster that is down is not asked three times as much.

A bucket: each request puts a part of an attempt in, each further attempt takes one out.
"""

from __future__ import annotations


class RetryBudget:
    """fraction  further attempts for each request
    burst     of them at once, at most; and at the start
    """

    def __init__(self, fraction: float, burst: int) -> None:
        self._fraction = fraction
        self._burst = burst
        self._left = float(burst)

    def request(self) -> None:
        """A request came."""
        self._left = min(self._burst, self._left + self._fraction)

    def left(self) -> bool:
        """Whether there is room for one more attempt."""
        return self._left >= 1

    def take(self) -> None:
        """One more attempt is made."""
        self._left = max(0.0, self._left - 1)
