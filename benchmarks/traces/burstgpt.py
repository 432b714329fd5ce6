"""BurstGPT's traces: arrivals and lengths, in later files sessions, nothing about prefixes.

    Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
    5,ChatGPT,472,18,490,Conversation log

Later files have the columns "Session ID" and "Elapsed time" as well. A request without
response tokens failed when it was recorded, and is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.traces import table
from benchmarks.traces.limits import Limits
from benchmarks.traces.trace import Session

PAGE_TOKENS = 64
COLUMNS = ("Timestamp", "Request tokens", "Response tokens")


def recognises(first: str) -> bool:
    """Whether a file's first line looks like this format."""
    return all(column in first.split(",") for column in COLUMNS)


def load(lines: Sequence[str], source: str, page_tokens: int, limits: Limits) -> list[Session]:
    """Sessions in order of their first request. Raises ValueError."""
    arrivals = (
        table.Arrival(
            time_s=row.parsed("Timestamp", float, "seconds"),
            prompt_tokens=row.tokens("Request tokens"),
            output_tokens=row.tokens("Response tokens"),
            session=row.text("Session ID"),
        )
        for row in table.read_rows(lines, source, COLUMNS)
    )
    return table.unshared((arrival for arrival in arrivals if arrival.output_tokens), source, page_tokens, limits)
