"""Where a request's time went inside its workers, by SGLang's own clock (`enable-request-time-stats-logging`)."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

FLAG = "enable-request-time-stats-logging"
_LINE = re.compile(r"ReqTimeStats\(.*?input_len=(\d+), cached_input_len=(\d+),.*?type=(\w+)\): (.*)")
_SPAN = re.compile(r"(\w+)_duration=(-?[\d.]+)ms")


@dataclass(frozen=True)
class TimeStats:
    """One request in one worker."""

    role: str
    """prefill, decode, or unified: one worker that does both."""
    input_tokens: int
    cached_tokens: int
    spans_ms: dict[str, float]
    """As SGLang names them: bootstrap, alloc_wait, queue, forward, transfer …"""


def read(lines: Iterable[str]) -> list[TimeStats]:
    """Those of a worker's log."""
    return [
        TimeStats(
            found[3], int(found[1]), int(found[2]), {name: float(value) for name, value in _SPAN.findall(found[4])}
        )
        for found in map(_LINE.search, lines)
        if found is not None
    ]


def medians_ms(stats: Iterable[TimeStats], input_tokens: int) -> dict[str, dict[str, float]]:
    """By role and span, of the requests of this length of which nothing was cached."""
    gathered: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in stats:
        if one.input_tokens == input_tokens and not one.cached_tokens:
            for name, value in one.spans_ms.items():
                gathered[one.role][name].append(value)
    return {
        role: {name: round(statistics.median(values), 2) for name, values in spans.items()}
        for role, spans in gathered.items()
    }
