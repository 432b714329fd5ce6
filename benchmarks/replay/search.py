"""The largest load at which an objective is kept, by trying."""

from __future__ import annotations

from collections.abc import Callable

STEP, COUNT_STEP = 1.15, 1.4
"""From one try to the next while one side of the answer is open: of rates; of counts, in which policies differ more."""
COUNTS_DOWN = 3
"""While every count tried was too much, the next one is so many times less."""
CLOSE = 1.02
"""Two loads this near are one."""
LEAST, MOST = 0.05, 8.0


def largest_rate(keeps: Callable[[float], bool], guess: float) -> float:
    """The largest rate for which `keeps` holds, within CLOSE; 0 where even LEAST is too much."""
    low, high = (guess, None) if keeps(guess) else (None, guess)
    while high is None:
        assert low is not None
        if low >= MOST:
            return low
        following = low * STEP
        if keeps(following):
            low = following
        else:
            high = following
    while low is None:
        if high <= LEAST:
            return 0.0
        following = high / STEP
        if keeps(following):
            low = following
        else:
            high = following
    while high / low > CLOSE:
        middle = (low * high) ** 0.5
        if keeps(middle):
            low = middle
        else:
            high = middle
    return low


def largest_count(keeps: Callable[[int], bool], guess: int, most: int) -> int:
    """The largest count from 1 to `most` for which `keeps` holds, within CLOSE; 0 where even 1 is too much."""
    low, high = 0, most + 1
    trial = min(guess, most)
    while high - low > max(1, low * (CLOSE - 1)):
        if keeps(trial):
            low = trial
        else:
            high = trial
        if high == most + 1:
            trial = min(most, max(low + 1, int(low * COUNT_STEP)))
        elif low == 0:
            trial = max(1, high // COUNTS_DOWN)
        else:
            trial = (low + high) // 2
        if not low < trial < high:
            break
    return low
