"""Workers and pairs that one request is not sent to again. A worker's next life is another worker."""

from __future__ import annotations

from dataclasses import dataclass, field

from router.fleet import Worker


@dataclass(slots=True)
class Avoid:
    workers: set[Worker] = field(default_factory=set)
    pairs: set[tuple[Worker, Worker]] = field(default_factory=set)
    """(prefill, decode)"""
