"""How long a pair may take until its pages are delivered: learned from what it took before, beside what was expected.

As TCP learns when to send again: of the ratio of actual to expected time, a mean and a mean deviation follow the
observations; what lies further off than several deviations is not waiting any more. A time that ran out doubles the
next ones, until an observation corrects it: a pair that has become slow is not given up for ever.
"""

from __future__ import annotations

from dataclasses import dataclass

MEAN_GAIN = 1 / 8
DEVIATION_GAIN = 1 / 4
DEVIATIONS = 4.0
FIRST_RATIO = 2.0
FIRST_DEVIATION = 2.0
MAX_PATIENCE = 64.0


@dataclass(slots=True)
class _Times:
    mean: float = FIRST_RATIO
    deviation: float = FIRST_DEVIATION
    patience: float = 1.0


class HandoffTimes:
    """floor_s, ceiling_s  no limit is shorter, or longer"""

    def __init__(self, floor_s: float, ceiling_s: float) -> None:
        self._floor_s = floor_s
        self._ceiling_s = ceiling_s
        self._pairs: dict[tuple[str, str], _Times] = {}

    def limit_s(self, prefill: str, decode: str, expected_s: float) -> float:
        """From dispatch, when a request of this pair is given up that was expected to take so long."""
        times = self._pairs.get((prefill, decode)) or _Times()
        ratio = times.mean + DEVIATIONS * times.deviation
        return min(self._ceiling_s, max(self._floor_s, expected_s * ratio) * times.patience)

    def learn(self, prefill: str, decode: str, expected_s: float, actual_s: float) -> None:
        """A request's pages were delivered."""
        times = self._pairs.setdefault((prefill, decode), _Times())
        ratio = actual_s / max(expected_s, 1e-3)
        times.deviation += DEVIATION_GAIN * (abs(ratio - times.mean) - times.deviation)
        times.mean += MEAN_GAIN * (ratio - times.mean)
        times.patience = 1.0

    def ran_out(self, prefill: str, decode: str) -> None:
        """A request was given up."""
        times = self._pairs.setdefault((prefill, decode), _Times())
        times.patience = min(MAX_PATIENCE, 2 * times.patience)

    def forget(self, worker: str) -> None:
        """The worker begins a new life, or is gone."""
        self._pairs = {pair: times for pair, times in self._pairs.items() if worker not in pair}
