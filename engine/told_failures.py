"""How many failed hand-offs SGLang's scheduler hears of in one tick.

It ends a failed request on the spot: logs it, frees its pages, answers. A few milliseconds each, which every
running request pays; a lost peer with many hand-offs would hold up all of them at once. So the others wait for the
next ticks, and look until then as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Sequence

AT_ONCE = 2


def tell(polls: Sequence[int], failed: int, waiting: int) -> list[int]:
    """The same polls, with `waiting` in place of every `failed` but the first AT_ONCE."""
    left = AT_ONCE
    told = []
    for poll in polls:
        if poll == failed and left == 0:
            told.append(waiting)
        else:
            left -= poll == failed
            told.append(poll)
    return told
