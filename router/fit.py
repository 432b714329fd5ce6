"""Constants learned from a stream of observations, some of which are nonsense.

A worker that was paused, a page fault, a neighbour's garbage collection: a few observations
lie far from all others, and must not move what the rest agree on. So a window of the last
ones is kept, each weighed by how far it lies from what the window says (Huber). What was
configured counts as a few observations that never leave, so the first real ones move the
constants and do not throw them about.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from itertools import combinations
from statistics import median

import numpy as np
import numpy.typing as npt

WINDOW = 256
"""Observations that are remembered."""
EVERY = 64
"""Observations between two fits, once there are many. A fit takes a few milliseconds."""
ROUNDS = 8
"""Of weighing anew."""
HUBER = 1.5
"""Robust standard deviations within which an observation counts whole."""
FARTHEST = 100.0
"""No observation counts as more times too long than this."""
PRIOR_WEIGHT = 0.3
"""What the error of a configured point counts, against an observation's."""
MEAN_WINDOW = 31
LEAST_RATIOS = 8
SAME = math.log(1.1)
"""Ratios this near to 1 are no difference, however sure."""
SURE = 3.0
"""Standard errors of the middle."""

Floats = npt.NDArray[np.float64]


class RobustFit:
    """value = constants · features, with no constant below zero.

    prior   the constants before anything was learned
    points  features at which the prior is held on to, weakly: [[features], ...]
    """

    def __init__(self, prior: Sequence[float], points: Sequence[Sequence[float]]) -> None:
        self.constants: tuple[float, ...] = tuple(prior)
        self.observed = 0
        """Observations so far."""
        self._prior = np.array(prior, float)
        anchors = np.array(points, float)
        # A prior of zero says nothing of how many times too long an observation is.
        self._anchors = anchors[anchors @ self._prior > 0]
        self._anchored = self._anchors @ self._prior
        self._features: deque[Sequence[float]] = deque(maxlen=WINDOW)
        self._values: deque[float] = deque(maxlen=WINDOW)

    def learn(self, features: Sequence[float], value: float) -> None:
        """One observation. Both are finite, and the value is above zero."""
        self._features.append(features)
        self._values.append(value)
        self.observed += 1
        # After each doubling at first: 1, 2, 4, 8, …
        if self.observed % EVERY == 0 or (self.observed < EVERY and not self.observed & (self.observed - 1)):
            self.constants = self._fit()

    def _fit(self) -> tuple[float, ...]:
        features = np.vstack([np.array(self._features, float), self._anchors])
        values = np.concatenate([np.array(self._values, float), self._anchored])
        count = len(self._values)
        # The prior at the usual speed: nonsense cannot move this beginning, however far off it lies.
        usual = features[:count] @ self._prior
        known = usual > 0
        constants = self._prior * (float(np.median(values[:count][known] / usual[known])) if known.any() else 1.0)
        for _ in range(ROUNDS):
            # A constant may begin at zero: what has no other is expected to take a little all the same.
            expected = np.maximum(features @ constants, values / FARTHEST)
            # How many times too long or too short, alike in both directions: a tenth of a second is
            # nothing in ten seconds and all of a tenth.
            error = np.log(values / expected)
            far = np.abs(error)
            spread = max(1.4826 * float(np.median(far[:count])), 1e-3)
            weights = np.sqrt(np.minimum(1.0, HUBER * spread / np.maximum(far, 1e-12)))
            weights[count:] *= PRIOR_WEIGHT
            # One step towards the least squares of the logarithms.
            step = _least_squares(features * (weights / expected)[:, None], (1 + error) * weights)
            if not step.any():
                # Observations that contradict each other by orders of magnitude: zero fits them least of all.
                break
            constants = step
        return tuple(float(constant) for constant in constants)


def _least_squares(rows: Floats, targets: Floats) -> Floats:
    """The solution without a negative constant. All subsets are tried: there are three constants at most."""
    count = rows.shape[1]
    normal, right = rows.T @ rows, rows.T @ targets
    best, best_error = np.zeros(count), np.inf
    for size in range(count, 0, -1):
        for chosen in combinations(range(count), size):
            kept = list(chosen)
            part = normal[np.ix_(kept, kept)]
            try:
                solution = np.linalg.solve(part, right[kept])
            except np.linalg.LinAlgError:
                continue
            if (solution < 0).any():
                continue
            error = float(solution @ part @ solution - 2 * solution @ right[kept])
            if error < best_error:
                best_error = error
                best = np.zeros(count)
                best[kept] = solution
        if best_error < np.inf and size == count:
            break
    return best


class RobustMean:
    """A number above zero that a stream of noisy ones lies around: their median, drawn to the prior while they are few.

    It is drawn in proportion: a first value that is fifty times too large makes it less than twice as large.
    """

    def __init__(self, prior: float) -> None:
        self.value = prior
        self._prior = prior
        self._values: deque[float] = deque(maxlen=MEAN_WINDOW)

    def learn(self, value: float) -> None:
        self._values.append(value)
        trusted = min(1.0, len(self._values) / 8)
        self.value = self._prior * (median(self._values) / self._prior) ** trusted


class SureRatio:
    """How many times the usual a stream of noisy ratios lies at: 1 unless they are sure of another.

    Equal workers never measure equal. If their differences counted, the one that noise favours would
    be sent everything that comes while all are idle.
    """

    def __init__(self) -> None:
        self.value = 1.0
        self._logs: deque[float] = deque(maxlen=MEAN_WINDOW)

    def learn(self, ratio: float) -> None:
        """One observation, above zero."""
        self._logs.append(math.log(ratio))
        middle = median(self._logs)
        spread = 1.4826 * median(abs(one - middle) for one in self._logs)
        sure = len(self._logs) >= LEAST_RATIOS and abs(middle) > SAME + SURE * spread / math.sqrt(len(self._logs))
        self.value = math.exp(middle) if sure else 1.0
