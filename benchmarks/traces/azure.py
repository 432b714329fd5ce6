"""Azure's LLM inference traces: arrivals and lengths, nothing about prefixes.

TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from benchmarks.traces import table
from benchmarks.traces.limits import Limits
from benchmarks.traces.trace import Session

PAGE_TOKENS = 64
COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def recognises(first: str) -> bool:
    """Whether a file's first line looks like this format."""
    return all(column in first.split(",") for column in COLUMNS)


def load(lines: Sequence[str], source: str, page_tokens: int, limits: Limits) -> list[Session]:
    """One session a request. Raises ValueError."""
    arrivals = (
        table.Arrival(
            time_s=row.parsed("TIMESTAMP", datetime.fromisoformat, "a date and time").timestamp(),
            prompt_tokens=row.tokens("ContextTokens"),
            output_tokens=row.tokens("GeneratedTokens"),
        )
        for row in table.read_rows(lines, source, COLUMNS)
    )
    return table.unshared(arrivals, source, page_tokens, limits)
