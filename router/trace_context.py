"""One id of a request, from the client's own trace to both workers: W3C Trace Context, `traceparent`.

A request that brings none begins a trace, whose id is the request's own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_PARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_SAMPLED = "01"


@dataclass(frozen=True, slots=True)
class TraceContext:
    """trace  32 hexadecimal digits
    flags    2 of them, as they came
    """

    trace: str
    flags: str = _SAMPLED

    @classmethod
    def of(cls, header: str, rid: str) -> TraceContext:
        """From a request's `traceparent`; one that makes no sense is no reason to refuse a request."""
        found = _PARENT.fullmatch(header)
        if found is None or not int(found[1], 16) or header.startswith("ff"):
            return cls(rid)
        return cls(found[1], found[3])

    def parent(self, rid: str) -> str:
        """What a worker gets: the span is this attempt's."""
        return f"00-{self.trace}-{rid[-16:]}-{self.flags}"
