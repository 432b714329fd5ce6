"""How long something may take before it is given up: learned from what it took before, beside what was expected.

As TCP learns when to send again: of the ratio of actual to expected time, a mean and a mean deviation follow the
observations; what lies further off than several deviations is not waiting any more. A time that ran out doubles the
next ones, until an observation corrects it: who has become slow is not given up for ever.

Kept for whoever takes the time: a pair that hands pages over, a decode worker that answers.
"""

from __future__ import annotations

from dataclasses import dataclass

MEAN_GAIN = 1 / 8
DEVIATION_GAIN = 1 / 4
DEVIATIONS = 4.0
MAX_PATIENCE = 64.0


@dataclass(slots=True)
class _Times:
    mean: float
    deviation: float
    patience: float = 1.0


class UsualTimes:
    """floor_s, ceiling_s  no limit is shorter, or longer
    first               ratio of actual to expected time, and its deviation, before anything was observed
    margin              of the mean ratio, so many times are always waited for
    """

    def __init__(self, floor_s: float, ceiling_s: float, *, first: float = 2.0, margin: float = 1.0) -> None:
        self._floor_s = floor_s
        self._ceiling_s = ceiling_s
        self._first = first
        self._margin = margin
        self._known: dict[tuple[str, ...], _Times] = {}

    def limit_s(self, expected_s: float, *workers: str) -> float:
        """When to give up what these workers are expected to take so long for."""
        times = self._known.get(workers) or self._unknown()
        ratio = max(self._margin * times.mean, times.mean + DEVIATIONS * times.deviation)
        return min(self._ceiling_s, max(self._floor_s, expected_s * ratio) * times.patience)

    def learn(self, expected_s: float, actual_s: float, *workers: str) -> None:
        """It was done."""
        times = self._known.setdefault(workers, self._unknown())
        ratio = actual_s / max(expected_s, 1e-3)
        times.deviation += DEVIATION_GAIN * (abs(ratio - times.mean) - times.deviation)
        times.mean += MEAN_GAIN * (ratio - times.mean)
        times.patience = 1.0

    def ran_out(self, *workers: str) -> None:
        """It was given up."""
        times = self._known.setdefault(workers, self._unknown())
        times.patience = min(MAX_PATIENCE, 2 * times.patience)

    def forget(self, worker: str) -> None:
        """The worker begins a new life, or is gone."""
        self._known = {workers: times for workers, times in self._known.items() if worker not in workers}

    def _unknown(self) -> _Times:
        return _Times(self._first, self._first)
