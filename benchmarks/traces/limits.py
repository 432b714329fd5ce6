"""Which part of a trace is wanted: a small pool cannot hold its longest prompts, a short run not all of its users."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import msgspec

from benchmarks.traces.trace import Session


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """None is no limit."""

    sessions: int | None = None
    """The first so many that have a request left."""
    prompt_tokens: int | None = None
    """Longer requests are left out; the session goes on without them."""
    think_s: float | None = None
    """Longer pauses are cut to this."""

    def allows(self, prompt_tokens: int) -> bool:
        return self.prompt_tokens is None or prompt_tokens <= self.prompt_tokens

    def think(self, think_s: float) -> float:
        return think_s if self.think_s is None else min(think_s, self.think_s)

    def first(self, sessions: Iterable[Session]) -> list[Session]:
        """The sessions that are wanted; none without a request. Takes no more from `sessions` than it needs."""
        return list(islice((session for session in sessions if session.turns), self.sessions))


NO_LIMITS = Limits()
