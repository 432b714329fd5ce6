"""One long prefix that every request begins with: whether it stays on one worker.

    python -m benchmarks.hot_prefix [--json]

Closed loop, virtual time, the replay's cluster: 8 to 128 clients ask again as soon as they are answered, each
request with a short end of its own. The fleet is cold at the start. A router that looks for the cache alone
sends all of it to the worker that had the first request; one that does not look at it computes everything.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

from benchmarks import report
from benchmarks.replay.cluster import Cluster
from benchmarks.replay.scenario import USUAL, Scenario
from benchmarks.traces.trace import Session, Trace, Turn
from router.policies import POLICIES
from transfer.pages import chain_ids

PREFIX_TOKENS, END_TOKENS, ANSWER_TOKENS = 2300, 40, 32
CLIENTS = (8, 16, 32, 64, 128)
LEAST_REQUESTS, LEAST_PER_CLIENT = 512, 8
PAGES = (16, 64)
CAPACITY_TOKENS = 200_000


class Shape(NamedTuple):
    """4 workers that do both, or 4 that prefill for 2 that decode."""

    name: str
    workers: int
    prefill: int = 0
    decode: int = 0


SHAPES = (Shape("4 both", 4), Shape("4 prefill + 2 decode", 6, 4, 2))
COLUMNS = ("fleet", "page", "clients", "policy", "requests", "hit %", "most requests / mean", "TTFT p50", "p99")


def workload(requests: int, page_tokens: int) -> Trace:
    """So many requests, each a session of one turn, that share all but their last END_TOKENS tokens."""
    prefix = list(range(PREFIX_TOKENS))
    return Trace(
        name="hot_prefix",
        synthetic=True,
        page_tokens=page_tokens,
        sessions=[
            Session(
                str(number),
                [
                    Turn(
                        number=number,
                        prompt_tokens=PREFIX_TOKENS + END_TOKENS,
                        output_tokens=ANSWER_TOKENS,
                        ids=chain_ids(
                            0,
                            prefix + [PREFIX_TOKENS + END_TOKENS * number + place for place in range(END_TOKENS)],
                            page_tokens,
                        ),
                    )
                ],
            )
            for number in range(requests)
        ],
    )


def measure(policy: str, clients: int, page_tokens: int, shape: Shape) -> dict[str, Any]:
    """One row. Times in seconds."""
    trace = workload(max(LEAST_REQUESTS, LEAST_PER_CLIENT * clients), page_tokens)
    scenario = Scenario(
        workers=shape.workers,
        prefill=shape.prefill,
        decode=shape.decode,
        capacity_tokens=CAPACITY_TOKENS,
        speed=USUAL,
        page_tokens=page_tokens,
    )
    outcome = Cluster(scenario, policy).closed_loop(trace, clients)
    return {
        "fleet": shape.name,
        "page_tokens": page_tokens,
        "clients": clients,
        "policy": policy,
        "requests": len(outcome.ttft_s),
        "hit_rate": round(outcome.hit_rate, 4),
        "request_imbalance": round(outcome.request_imbalance, 3),
        "ttft_s_p50": round(outcome.ttft(0.5), 3),
        "ttft_s_p99": round(outcome.ttft(0.99), 3),
    }


def rows() -> Iterator[dict[str, Any]]:
    """Every policy in every fleet, ours first."""
    for shape, page_tokens, clients, policy in product(SHAPES, PAGES, CLIENTS, POLICIES):
        yield measure(policy, clients, page_tokens, shape)


def main(words: Sequence[str] | None = None) -> int:
    options = report.arguments(__doc__ or "").parse_args(words)
    found = list(rows())
    table = [(*list(row.values())[:5], f"{100 * row['hit_rate']:.1f}", *list(row.values())[6:]) for row in found]
    report.publish({"benchmark": "hot_prefix", "rows": found}, COLUMNS, table, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
