"""What an idle worker has to give, beside what it had when it was new: less of it has leaked."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from benchmarks.bench_cluster import emptied
from benchmarks.client import get_json
from engine.launch.cluster import Cluster

IDLE_S = 60.0
"""Within which a worker without traffic has nothing to do any more."""
SAID_S = 3.0
"""Within which it has said so."""


@dataclass(frozen=True)
class Pools:
    """Of one worker: `transfer.wire.Pools`."""

    free_tokens: int
    free_requests: int
    free_rows: int
    rooms: int


def flushed(cluster: Cluster, url: str) -> dict[str, Pools]:
    """Every worker's pools, once it is idle and its cache is empty. Raises TimeoutError for one that is at work."""
    deadline_s = time.monotonic() + IDLE_S
    for worker in cluster.plan.workers:
        while not emptied(cluster, worker.name):
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{worker.name}: wanted it to be idle within {IDLE_S:.0f} s, found it at work")
            time.sleep(0.3)
    time.sleep(SAID_S)
    return pools(url)


def pools(url: str) -> dict[str, Pools]:
    """As the workers say now."""
    workers: list[dict[str, Any]] = get_json(url, "/api/state")["workers"]
    return {one["name"]: Pools(**one["pools"]) for one in workers if one["pools"]}


def leaked_tokens(before: Pools, now: Pools) -> int:
    return max(0, before.free_tokens - now.free_tokens)


def leaked_requests(before: Pools, now: Pools) -> int:
    """Slots, rows and rooms that nobody uses and nobody has given back."""
    slots = max(0, before.free_requests - now.free_requests)
    rows = max(0, before.free_rows - now.free_rows)
    return slots + rows + max(0, now.rooms - before.rooms)
