"""Which waiting requests let an earlier one go first, as it computes what they begin with.

SGLang takes as many waiting requests into a pass as fit, in the order in which they came, and none of them finds in the
cache what another one of the same pass computes, nor what a pass computes that is under way. So of ten requests with a
new system prompt nine would compute it again. One pass later they find it.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from functools import cached_property
from typing import NamedTuple

LEAST_TOKENS = 256
"""What is computed twice must be worth a pass of its own: that takes longer than some tokens more in another's."""
LOOKED_AT = 16
"""Of those that wait for nobody, only so many could be in the next pass."""


class Cached(NamedTuple):
    """What the cache has of a prompt.

    node    the end of it in the cache's tree: equal for all that have the same of it
    tokens  how many it is
    """

    node: Hashable
    tokens: int


class Prompt:
    """One request's.

    ids     its tokens
    space   prompts share pages only within one
    cached  asked once, and only where that matters
    least   beginnings are alike by so many tokens
    """

    def __init__(
        self, ids: array[int], space: str | None, cached: Callable[[], Cached], least: int = LEAST_TOKENS
    ) -> None:
        self._ids = ids
        self._space = space
        self._cached = cached
        self._least = least

    @cached_property
    def beginning(self) -> tuple[str | None, bytes] | None:
        """Equal for all that might wait for each other; None for one that is too short for it."""
        return (self._space, self._ids[: self._least].tobytes()) if len(self._ids) >= self._least else None

    @cached_property
    def lacking(self) -> tuple[Hashable, bytes] | None:
        """Where the cache ends, and what comes next: equal for those of which one would compute so much of the other.
        None where there is no such."""
        node, start = self._known
        end = start + self._least
        return (node, self._ids[start:end].tobytes()) if len(self._ids) >= end else None

    def goes_on_like(self, other: Prompt) -> bool:
        """Whether the other one begins with what this one has in the cache and so much more."""
        end = self._known.tokens + self._least
        return len(self._ids) >= end and self._ids[:end] == other._ids[:end]

    @cached_property
    def _known(self) -> Cached:
        return self._cached()


class _Alike:
    """Prompts of one beginning."""

    def __init__(self) -> None:
        self.computing: list[Prompt] = []
        self._first: Prompt | None = None
        self._lacking: set[tuple[Hashable, bytes] | None] = set()

    def waits(self, prompt: Prompt) -> bool:
        """Whether this one does for another. Else others may wait for it."""
        if self._first is None and not self.computing:
            # What the cache has of it matters when there is a second one.
            self._first = prompt
            return False
        if self._first is not None and not self._lacking:
            self._lacking.add(self._first.lacking)
        if prompt.lacking is not None and (
            prompt.lacking in self._lacking or any(prompt.goes_on_like(one) for one in self.computing)
        ):
            return True
        self._lacking.add(prompt.lacking)
        return False


def followers(waiting: Iterable[Prompt], computing: Iterable[Prompt]) -> list[int]:
    """Places in `waiting` of those that let another go first. The first of a kind is never among them.

    waiting    in the order in which they are to be computed; looked at until LOOKED_AT wait for nobody
    computing  those that are being computed, and are not in the cache yet
    """
    alike: defaultdict[tuple[str | None, bytes], _Alike] = defaultdict(_Alike)
    for one in computing:
        if one.beginning is not None:
            alike[one.beginning].computing.append(one)
    found: list[int] = []
    for place, one in enumerate(waiting):
        if place - len(found) >= LOOKED_AT:
            break
        if one.beginning is not None and alike[one.beginning].waits(one):
            found.append(place)
    return found
