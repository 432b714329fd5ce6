"""One stream of requests over several routers with the same workers: do they choose as one would?

    python -m benchmarks.split_stream TRACE [--json]

TRACE is a file, or a folder with mooncake_conversation_trace.jsonl. The replay's cluster, in virtual time; each request
goes to the next router. With gossip each counts what the others have in flight; without it, only its own. All follow
the same page events.

At each choice the other routers are asked too where they would send this prompt now. `agreement` is the share of their
answers that name the same prefill worker, or to which that worker is an equal: its cost is above their least by no more
than the policy's tolerance. `same` is the share of those that name the same worker.

The trace's requests come all together every 3 s, where no gossip has time to go about between one and the next. So the
same is shown with requests spread over the time until the next ones come.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import report
from benchmarks.replay import suite
from benchmarks.replay.cluster import Cluster
from benchmarks.replay.scenario import Scenario, speed_of
from benchmarks.replay.virtual_router import VirtualRouter
from benchmarks.traces.arrivals import spread
from benchmarks.traces.trace import Session, Trace, Turn
from router.decision import Decision
from router.pair_cost import PairCost

TRACE = "mooncake_conversation_trace"
WORKERS = 8
CAPACITY_TOKENS = 3_000_000
RATES = (1.0, 1.2)
ROUNDING_S = 1e-6


class Routers(NamedTuple):
    """How many, and whether they tell each other what they have in flight."""

    number: int
    gossip: bool = True


ROWS = (Routers(1), Routers(2), Routers(2, gossip=False), Routers(4), Routers(4, gossip=False))
COLUMNS = (
    "arrivals",
    "rate",
    "routers",
    "gossip",
    "hit %",
    "TTFT mean",
    "p50",
    "p99",
    "imbalance",
    "agreement %",
    "same %",
)


@dataclass(slots=True)
class Opinions:
    """Asks the other routers at each choice."""

    scenario: Scenario
    others: Sequence[VirtualRouter] = ()
    """All routers of the run."""
    asked: int = 0
    same: int = 0
    equal: int = 0
    """Another worker, but the chosen one would have been no worse."""

    def watch(self, router: VirtualRouter, session: Session, turn: Turn, decision: Decision, now_s: float) -> None:
        for other in self.others:
            if other is not router:
                opinion = other.choose(turn, session.id, self.scenario.page_tokens, now_s)
                self.asked += 1
                if opinion.prefill == decision.prefill:
                    self.same += 1
                elif decision.prefill in self._equals(opinion):
                    self.equal += 1

    @property
    def agreement(self) -> float | None:
        return (self.same + self.equal) / self.asked if self.asked else None

    def _equals(self, opinion: Decision) -> set[str]:
        """Prefill workers that cost no more than the tolerance above the least."""
        pairs, alpha = opinion.pairs, opinion.alpha
        cost_s = {
            view.name: view.wait_s + weighed_s + min(pairs.decode_s(view))
            for view, weighed_s in zip(pairs.prefills, pairs.weighed_s(alpha), strict=True)
        }
        tolerance_s = self.scenario.cost.tie_fraction * alpha * pairs.whole_prompt_s + ROUNDING_S
        return {name for name, seconds in cost_s.items() if seconds <= min(cost_s.values()) + tolerance_s}


def measure(trace: Trace, scenario: Scenario, rate: float, routers: Routers) -> dict[str, Any]:
    """One row. Times in seconds."""
    opinions = Opinions(scenario)
    cluster = Cluster(scenario, PairCost.name, routers=routers.number, gossip=routers.gossip, watch=opinions.watch)
    opinions.others = cluster.routers
    outcome = cluster.open_loop(trace, rate)
    return {
        "rate": rate,
        "routers": routers.number,
        "gossip": routers.gossip and routers.number > 1,
        "hit_rate": round(outcome.hit_rate, 4),
        "ttft_s_mean": round(outcome.ttft_mean, 3),
        "ttft_s_p50": round(outcome.ttft(0.5), 3),
        "ttft_s_p99": round(outcome.ttft(0.99), 3),
        "imbalance": round(outcome.imbalance, 3),
        "request_imbalance": round(outcome.request_imbalance, 3),
        "refused": outcome.refused,
        "asked": opinions.asked,
        "agreement": None if opinions.agreement is None else round(opinions.agreement, 4),
        "same": round(opinions.same / opinions.asked, 4) if opinions.asked else None,
    }


def rows(trace: Trace, scenario: Scenario) -> Iterator[dict[str, Any]]:
    for arrivals, one in (("recorded", trace), ("spread", spread(trace))):
        for rate, routers in product(RATES, ROWS):
            report.progress(f"{arrivals}, rate {rate:g}, {routers.number} routers, gossip {routers.gossip}")
            yield {"arrivals": arrivals, **measure(one, scenario, rate, routers)}


def main(words: Sequence[str] | None = None) -> int:
    parser = report.arguments(__doc__ or "")
    parser.add_argument("trace", type=Path, metavar="TRACE", help=f"a file, or a folder with {TRACE}.jsonl")
    options = parser.parse_args(words)
    try:
        trace = suite.open_loop(options.trace, TRACE)
    except (OSError, ValueError) as error:
        print(f"split_stream: {error}", file=sys.stderr)
        return 2
    scenario = Scenario(
        workers=WORKERS, capacity_tokens=CAPACITY_TOKENS, speed=speed_of(trace), page_tokens=trace.page_tokens
    )
    found = list(rows(trace, scenario))
    result = {
        "benchmark": "split_stream",
        "trace": trace.name,
        "synthetic": trace.synthetic,
        "workers": WORKERS,
        "capacity_tokens": CAPACITY_TOKENS,
        "rows": found,
    }
    table = [
        (
            row["arrivals"],
            row["rate"],
            row["routers"],
            "yes" if row["gossip"] else "no",
            f"{100 * row['hit_rate']:.1f}",
            row["ttft_s_mean"],
            row["ttft_s_p50"],
            row["ttft_s_p99"],
            row["imbalance"],
            "" if row["agreement"] is None else f"{100 * row['agreement']:.1f}",
            "" if row["same"] is None else f"{100 * row['same']:.1f}",
        )
        for row in found
    ]
    report.publish(result, COLUMNS, table, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
