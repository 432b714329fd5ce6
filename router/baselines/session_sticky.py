"""A session's requests on the worker that its first one found least loaded.

Stronger than hashing the session, as it looks at the load once; but a session that grows, or a
worker that falls behind, moves nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from router.baselines.least_load import LeastLoad
from router.policy import Ask, Pick, Policy

if TYPE_CHECKING:
    from router.pairs import Pairs

MAX_SESSIONS = 100_000
"""Remembered at most; the one that was quiet for the longest is forgotten."""


class SessionSticky(Policy):
    """A request without a session goes to the least loaded."""

    name = "session_sticky"

    def __init__(self, seed: int, max_sessions: int = MAX_SESSIONS) -> None:
        self._least_load = LeastLoad(seed)
        self._max_sessions = max_sessions
        self._workers: OrderedDict[str, str] = OrderedDict()

    def choose(self, ask: Ask, pairs: Pairs) -> Pick:
        pinned = self._workers.get(ask.session) if ask.session else None
        for view in pairs.prefills:
            if view.name == pinned:
                return Pick(view, pairs.idlest_partner(view), "pinned")
        return self._least_load.choose(ask, pairs)

    def sent(self, ask: Ask, prefill: str, decode: str) -> None:
        if not ask.session:
            return
        self._workers[ask.session] = prefill
        self._workers.move_to_end(ask.session)
        if len(self._workers) > self._max_sessions:
            self._workers.popitem(last=False)

    def lost(self, worker: str) -> None:
        for session in [session for session, pinned in self._workers.items() if pinned == worker]:
            del self._workers[session]
