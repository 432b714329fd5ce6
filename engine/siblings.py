"""Which waiting requests let an earlier one go first, as it computes what they begin with.

SGLang takes as many waiting requests into a pass as fit, in the order in which they came, and none of them finds in the
cache what another one of the same pass computes, nor what a pass computes that is under way. So of ten requests with a
new system prompt nine would compute it again. One pass later they find it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import cached_property

LEAST_TOKENS = 256
"""What is computed twice must be worth a pass of its own: that takes longer than some tokens more in another's."""
LOOKED_AT = 32
"""Of a long queue only so many could be in the next pass."""


class Prompt:
    """One request's.

    ids     its tokens
    space   prompts share pages only within one
    cached  how many of its first tokens are in the cache; asked once, and only where that matters
    """

    def __init__(self, ids: array[int], space: str | None, cached: Callable[[], int]) -> None:
        self.ids = ids
        self.space = space
        self._cached = cached

    @cached_property
    def beginning(self) -> tuple[str | None, bytes] | None:
        """Equal for all that might follow each other; None for one that is too short for it."""
        if len(self.ids) < LEAST_TOKENS:
            return None
        return self.space, self.ids[:LEAST_TOKENS].tobytes()

    def follows(self, other: Prompt) -> bool:
        """Whether so many tokens that it lacks are the beginning of the other one too, in the same space."""
        end = self._cached_tokens + LEAST_TOKENS
        return len(self.ids) >= end and len(other.ids) >= end and self.ids[:end] == other.ids[:end]

    @cached_property
    def _cached_tokens(self) -> int:
        return self._cached()


def followers(waiting: Sequence[Prompt], computing: Sequence[Prompt]) -> list[int]:
    """Places in `waiting` of those that let another go first. The first of a kind is never among them.

    waiting    in the order in which they are to be computed
    computing  those that are being computed, and are not in the cache yet
    """
    leaders: dict[tuple[str | None, bytes], list[Prompt]] = {}
    for one in computing:
        if one.beginning is not None:
            leaders.setdefault(one.beginning, []).append(one)
    found = []
    for place, one in enumerate(waiting[:LOOKED_AT]):
        if one.beginning is None:
            continue
        same = leaders.setdefault(one.beginning, [])
        if any(one.follows(leader) for leader in same):
            found.append(place)
        else:
            same.append(one)
    return found
