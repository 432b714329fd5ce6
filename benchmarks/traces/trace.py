"""A workload as sessions of requests: lengths, times and page ids, no text.

    Trace ── Session ── Turn, Turn, …      open loop: every turn has a time of arrival
                                           closed loop: a turn follows the answer before it, after a think time

One shape for every file format (`benchmarks.traces.load`), so that a replay knows none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One request."""

    number: int
    """Place in the trace, from 0. Requests of the same moment are sent in this order."""
    prompt_tokens: int
    output_tokens: int
    ids: Sequence[int]
    """Chain ids of the prompt's whole pages, first page first."""
    partial_id: int | None = None
    """Of the last page where it is not whole. Engines cache whole pages only, but published hit rates count it."""
    at_s: float | None = None
    """When it arrives, from the trace's start. None in a closed loop."""
    think_s: float = 0.0
    """Closed loop: from the end of the session's answer before it until it is sent."""


class Session(msgspec.Struct, frozen=True):
    """Requests of one user, agent or conversation, in order."""

    id: str
    turns: Sequence[Turn]


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    synthetic: bool
    """Not recorded from real traffic; to be said wherever a result is shown."""
    page_tokens: int
    sessions: Sequence[Session]

    @property
    def closed(self) -> bool:
        """Whether sessions wait for their answers instead of arriving by the clock."""
        return any(turn.at_s is None for session in self.sessions for turn in session.turns)

    @property
    def requests(self) -> int:
        return sum(len(session.turns) for session in self.sessions)

    def only(self, wanted: Callable[[Turn], bool]) -> Trace:
        """The same with these requests alone, and without sessions that have none of them."""
        kept = [Session(one.id, [turn for turn in one.turns if wanted(turn)]) for one in self.sessions]
        return msgspec.structs.replace(self, sessions=[session for session in kept if session.turns])

    def arrivals(self) -> list[tuple[float, Session, Turn]]:
        """Every request with its time, earliest first. Raises ValueError for a closed loop."""
        arrivals = []
        for session in self.sessions:
            for turn in session.turns:
                if turn.at_s is None:
                    raise ValueError(f"{self.name}: wanted times of arrival, found a closed loop")
                arrivals.append((turn.at_s, session, turn))
        return sorted(arrivals, key=lambda arrival: (arrival[0], arrival[2].number))
