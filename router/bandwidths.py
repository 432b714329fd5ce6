"""How fast each pair of workers hands pages over, as far as hand-offs between them have shown.

A matrix, because a choice looks at every pair at once: of 64 prefill and 64 decode workers there are
4,096, and reading a dictionary for each takes longer than all the rest of the choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import numpy.typing as npt

from router.fit import RobustMean

Floats = npt.NDArray[np.float64]
_NOBODY = -1
"""The last row and the last column are of workers without a hand-off: they stay unknown."""


class Bandwidths:
    """Seconds a byte, by prefill and decode worker, in the order in which they were first seen."""

    def __init__(self, usual_s: float) -> None:
        """usual_s: seconds a byte, of pairs without a hand-off, until there was any."""
        self._usual = RobustMean(usual_s)
        self._means: dict[tuple[str, str], RobustMean] = {}
        self._rows: dict[str, int] = {}
        self._columns: dict[str, int] = {}
        self._seconds: Floats = np.full((1, 1), np.nan)

    def __iter__(self) -> Iterator[tuple[str, str, float]]:
        """(prefill worker, decode worker, seconds a byte) of every pair with a hand-off."""
        return ((prefill, decode, mean.value) for (prefill, decode), mean in self._means.items())

    def __bool__(self) -> bool:
        """Whether there was any hand-off."""
        return bool(self._means)

    @property
    def usual_s(self) -> float:
        """Seconds a byte, of any pair."""
        return self._usual.value

    def byte_s(self, prefill: str, decode: str) -> float:
        """Seconds a byte, of this pair."""
        mean = self._means.get((prefill, decode), self._usual)
        return mean.value

    def bytes_s(self, prefills: Sequence[str], decodes: Sequence[str]) -> Floats:
        """`byte_s` of every pair. Shape: (prefills, decodes)."""
        rows = [self._rows.get(name, _NOBODY) for name in prefills]
        columns = [self._columns.get(name, _NOBODY) for name in decodes]
        found = self._seconds[rows][:, columns]
        found[np.isnan(found)] = self._usual.value
        return found

    def learn(self, prefill: str, decode: str, byte_s: float) -> None:
        """A hand-off between these took so long for each of its bytes."""
        mean = self._means.get((prefill, decode))
        if mean is None:
            mean = self._means[prefill, decode] = RobustMean(self._usual.value)
        mean.learn(byte_s)
        self._usual.learn(byte_s)
        row, column = self._place(prefill, decode)
        self._seconds[row, column] = mean.value

    def forget(self, worker: str) -> None:
        """Another worker may take this name."""
        kept = {pair: mean for pair, mean in self._means.items() if worker not in pair}
        if len(kept) == len(self._means):
            return
        self._means, self._rows, self._columns = kept, {}, {}
        self._seconds = np.full((1, 1), np.nan)
        for (prefill, decode), mean in kept.items():
            row, column = self._place(prefill, decode)
            self._seconds[row, column] = mean.value

    def _place(self, prefill: str, decode: str) -> tuple[int, int]:
        row = self._rows.setdefault(prefill, len(self._rows))
        column = self._columns.setdefault(decode, len(self._columns))
        rows, columns = self._seconds.shape
        if row >= rows - 1 or column >= columns - 1:
            grown = np.full((_room(row, rows), _room(column, columns)), np.nan)
            grown[: rows - 1, : columns - 1] = self._seconds[:-1, :-1]
            self._seconds = grown
        return row, column


def _room(place: int, size: int) -> int:
    """A size that has this place and one more, grown by doubling."""
    return next(grown for grown in (size << doubled for doubled in count()) if place < grown - 1)
