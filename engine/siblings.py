"""Which waiting requests let an earlier one go first, as it computes what they begin with.

SGLang takes as many waiting requests into a pass as fit, in the order in which they came, and none of them finds in the
cache what another one of the same pass computes, nor what a pass computes that is under way. So of ten requests with a
new system prompt nine would compute it again. One pass later they find it.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
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
        self._ids = ids
        self._space = space
        self._cached = cached

    @cached_property
    def beginning(self) -> tuple[str | None, bytes] | None:
        """Equal for all that might wait for each other; None for one that is too short for it."""
        return (self._space, self._ids[:LEAST_TOKENS].tobytes()) if len(self._ids) >= LEAST_TOKENS else None

    @cached_property
    def lacking(self) -> bytes | None:
        """It up to so many tokens beyond those in the cache; None where it has no such. Whoever begins with the same
        has as many in the cache, so it is the same of both."""
        end = self._cached() + LEAST_TOKENS
        return self._ids[:end].tobytes() if len(self._ids) >= end else None

    def begins(self, tokens: bytes) -> bool:
        """Whether it begins with these."""
        end = len(tokens) // self._ids.itemsize
        return self._ids[:end].tobytes() == tokens


class _Alike:
    """Prompts of one beginning."""

    def __init__(self) -> None:
        self.computing: list[Prompt] = []
        self._first: list[Prompt] = []

    def waits(self, prompt: Prompt) -> bool:
        """Whether this one does for another. Else others may wait for it."""
        if self.computing or self._first:
            lacking = prompt.lacking
            if lacking is not None and (
                any(one.lacking == lacking for one in self._first) or any(one.begins(lacking) for one in self.computing)
            ):
                return True
        self._first.append(prompt)
        return False


def followers(waiting: Sequence[Prompt], computing: Sequence[Prompt]) -> list[int]:
    """Places in `waiting` of those that let another go first. The first of a kind is never among them.

    waiting    in the order in which they are to be computed
    computing  those that are being computed, and are not in the cache yet
    """
    alike: defaultdict[tuple[str | None, bytes], _Alike] = defaultdict(_Alike)
    for one in computing:
        if one.beginning is not None:
            alike[one.beginning].computing.append(one)
    return [
        place
        for place, one in enumerate(waiting[:LOOKED_AT])
        if one.beginning is not None and alike[one.beginning].waits(one)
    ]
