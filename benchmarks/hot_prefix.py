"""One long prefix that every request begins with: whether it stays on one worker.

    python -m benchmarks.hot_prefix [--json]

Closed loop, virtual time, the replay's cluster: 8 to 128 clients ask again soon after they are answered, each
request with a short end of its own. Two starts:

    warm one  one request comes first and is answered; then the clients begin, one after the other within
              STAGGER_S. Exactly one worker has the prefix, and a router that looks for the cache alone
              sends everything there
    cold      all clients begin at once and nobody has the prefix: whoever counts load spreads it

All requests count, the first one too. `decisions` counts them by the first word of the reason that the router
gave: of ours, "copied" is the rule that makes a hot prefix's next holder.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, Literal, NamedTuple

from benchmarks import report
from benchmarks.replay.cluster import Cluster
from benchmarks.replay.outcome import Outcome
from benchmarks.replay.scenario import USUAL, Scenario
from benchmarks.replay.virtual_router import VirtualRouter
from benchmarks.traces.trace import Session, Trace, Turn
from router.decision import Decision
from router.policies import POLICIES
from transfer.pages import chain_ids

Start = Literal["warm one", "cold"]
STARTS: tuple[Start, ...] = ("warm one", "cold")
PREFIX_TOKENS, END_TOKENS, ANSWER_TOKENS = 2300, 40, 32
THINK_S = 0.1
"""Mean pause of a client between an answer and its next request."""
STAGGER_S = 3.0
"""From the first client's beginning to the last one's."""
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
COLUMNS = (
    "fleet",
    "page",
    "start",
    "clients",
    "policy",
    "requests",
    "hit %",
    "most requests / mean",
    "copied",
    "TTFT p50",
    "p99",
)


class HotCluster(Cluster):
    """A cluster that clients begin with one after the other, and that counts why requests went where they did."""

    def __init__(self, scenario: Scenario, policy: str) -> None:
        super().__init__(scenario, policy, watch=self._count)
        self.decisions: Counter[str] = Counter()
        """Requests by the first word of their decision's reason."""

    def clients(self, trace: Trace, start: Start) -> Outcome:
        """Every session is a client. Where one worker is to be warm, the first session comes before all others."""
        self._left = trace.requests

        def ask(session: Session, place: int, now_s: float) -> None:
            def answered(at_s: float) -> None:
                if place + 1 < len(session.turns):
                    think_s = session.turns[place + 1].think_s
                    self.later(at_s + think_s, lambda later_s: ask(session, place + 1, later_s))

            self._send(session, session.turns[place], now_s, now_s, answered)

        def begin(sessions: Sequence[Session], stagger_s: float, now_s: float) -> None:
            for number, session in enumerate(sessions):
                self.later(now_s + stagger_s * number / len(sessions), partial(ask, session, 0))

        first, *others = trace.sessions
        if start == "warm one":
            (turn,) = first.turns
            self._send(first, turn, 0.0, 0.0, lambda at_s: begin(others, STAGGER_S, at_s))
        else:
            begin(trace.sessions, 0.0, 0.0)
        return self._finish()

    def _count(self, router: VirtualRouter, session: Session, turn: Turn, decision: Decision, now_s: float) -> None:
        self.decisions[decision.kind] += 1


def workload(clients: int, page_tokens: int, start: Start) -> Trace:
    """Requests that share all but their last END_TOKENS tokens.

    Each client is a session; before the clients of a warm start comes a session of one request.
    """
    thinking = random.Random(clients)
    per_client = max(LEAST_PER_CLIENT, LEAST_REQUESTS // clients)
    prefix = list(range(PREFIX_TOKENS))
    made = 0

    def turn() -> Turn:
        nonlocal made
        end = [PREFIX_TOKENS + END_TOKENS * made + place for place in range(END_TOKENS)]
        made += 1
        return Turn(
            number=made - 1,
            prompt_tokens=PREFIX_TOKENS + END_TOKENS,
            output_tokens=ANSWER_TOKENS,
            ids=chain_ids(0, prefix + end, page_tokens),
            think_s=thinking.uniform(0, 2 * THINK_S),
        )

    before = [Session("first", [turn()])] if start == "warm one" else []
    return Trace(
        name="hot_prefix",
        synthetic=True,
        page_tokens=page_tokens,
        sessions=[
            *before,
            *(Session(f"client-{client}", [turn() for _ in range(per_client)]) for client in range(clients)),
        ],
    )


def measure(policy: str, clients: int, page_tokens: int, shape: Shape, start: Start) -> dict[str, Any]:
    """One row. Times in seconds."""
    scenario = Scenario(
        workers=shape.workers,
        prefill=shape.prefill,
        decode=shape.decode,
        capacity_tokens=CAPACITY_TOKENS,
        speed=USUAL,
        page_tokens=page_tokens,
    )
    cluster = HotCluster(scenario, policy)
    outcome = cluster.clients(workload(clients, page_tokens, start), start)
    return {
        "fleet": shape.name,
        "page_tokens": page_tokens,
        "start": start,
        "clients": clients,
        "policy": policy,
        "requests": len(outcome.ttft_s),
        "hit_rate": round(outcome.hit_rate, 4),
        "request_imbalance": round(outcome.request_imbalance, 3),
        "decisions": dict(sorted(cluster.decisions.items())) if policy == POLICIES[0] else {},
        "ttft_s_p50": round(outcome.ttft(0.5), 3),
        "ttft_s_p99": round(outcome.ttft(0.99), 3),
    }


def rows() -> Iterator[dict[str, Any]]:
    """Every policy in every fleet, ours first."""
    for shape, page_tokens, start, clients, policy in product(SHAPES, PAGES, STARTS, CLIENTS, POLICIES):
        yield measure(policy, clients, page_tokens, shape, start)


def main(words: Sequence[str] | None = None) -> int:
    options = report.arguments(__doc__ or "").parse_args(words)
    found = list(rows())
    table = [
        (
            *(row[name] for name in ("fleet", "page_tokens", "start", "clients", "policy", "requests")),
            f"{100 * row['hit_rate']:.1f}",
            row["request_imbalance"],
            row["decisions"].get("copied", ""),
            row["ttft_s_p50"],
            row["ttft_s_p99"],
        )
        for row in found
    ]
    report.publish({"benchmark": "hot_prefix", "rows": found}, COLUMNS, table, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
