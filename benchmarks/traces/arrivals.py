"""Requests that a trace puts at the same moment, spread over the time until the next moment.

A recorder that rounds to steps of 3 s makes ten requests arrive at once that never did. As
published, such a trace is harder on every policy than the traffic was: say which one was replayed.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import msgspec

from benchmarks.traces.trace import Session, Trace


def spread(trace: Trace) -> Trace:
    """The same requests in the same order: the n-th of k at a moment moves by n/k of the way to the next moment.

    Those of the last moment stay. Raises ValueError for a closed loop.
    """
    arrivals = trace.arrivals()
    counts = Counter(at_s for at_s, _, _ in arrivals)
    following = dict(pairwise(counts))
    passed: Counter[float] = Counter()
    times_s: dict[int, float] = {}
    for at_s, _, turn in arrivals:
        step_s = following.get(at_s, at_s) - at_s
        times_s[turn.number] = at_s + step_s * passed[at_s] / counts[at_s]
        passed[at_s] += 1
    sessions = [
        Session(session.id, [msgspec.structs.replace(turn, at_s=times_s[turn.number]) for turn in session.turns])
        for session in trace.sessions
    ]
    return msgspec.structs.replace(trace, sessions=sessions)
