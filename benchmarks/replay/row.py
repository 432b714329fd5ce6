"""One cell of the comparison: a trace, a fleet and a policy, at the trace's own load and at the largest it sustains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.replay.cluster import Cluster
from benchmarks.replay.objective import Objective
from benchmarks.replay.outcome import Outcome
from benchmarks.replay.paper import PaperReplay
from benchmarks.replay.scenario import Scenario
from benchmarks.replay.search import largest_count, largest_rate
from benchmarks.traces.trace import Trace
from router.policies import make_policy

LANES = 64
"""Sessions at a time of a closed loop, where nothing else is said."""
Tell = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is reported of a cell. Times in seconds."""

    trace: str
    capacity_tokens: int
    workers: int
    policy: str
    hit_rate: float
    ttft_s_mean: float
    ttft_s_p50: float
    ttft_s_p99: float
    imbalance: float
    sustainable_load: float | None
    """Open loop: times the trace's speed. Closed loop: sessions at a time. None where it was not looked for."""
    load: float
    """At which the other values were taken, in the same unit."""
    ttft_s_p90: float
    request_imbalance: float
    refused: int
    model: str
    synthetic: bool

    def json(self) -> dict[str, Any]:
        return asdict(self)


def replay(
    trace: Trace,
    scenario: Scenario,
    policy: str,
    model: str,
    load: float,
    objective: Objective | None = None,
    tell: Tell | None = None,
) -> Outcome:
    """One run. model: fifo (on paper) or sglang (simulated workers). load: rate, or lanes of a closed loop."""
    runner = (
        PaperReplay(scenario, make_policy(policy, scenario.cost, scenario.seed))
        if model == "fifo"
        else Cluster(scenario, policy)
    )
    if trace.closed:
        return runner.closed_loop(trace, max(1, int(load)), objective, tell)
    return runner.open_loop(trace, load, objective, tell)


def measure(
    trace: Trace,
    scenario: Scenario,
    policy: str,
    model: str,
    load: float,
    search: bool = True,
    tell: Tell | None = None,
) -> tuple[Row, Outcome]:
    """The row, and the run at `load`."""
    outcome = replay(trace, scenario, policy, model, load, tell=tell)
    objective_s = scenario.speed.objective_s

    def keeps(tried: float) -> bool:
        if tried == load:
            return outcome.ttft(0.9) <= objective_s and not outcome.refused
        objective = Objective(objective_s, trace.requests)
        return not replay(trace, scenario, policy, model, tried, objective, tell).cut

    sustained = None
    if search:
        sustained = (
            float(largest_count(keeps, int(load), len(trace.sessions))) if trace.closed else largest_rate(keeps, load)
        )
    row = Row(
        trace=trace.name,
        capacity_tokens=scenario.capacity_tokens,
        workers=scenario.workers if not scenario.prefill else scenario.prefill + scenario.decode,
        policy=policy,
        hit_rate=round(outcome.hit_rate, 4),
        ttft_s_mean=round(outcome.ttft_mean, 3),
        ttft_s_p50=round(outcome.ttft(0.5), 3),
        ttft_s_p99=round(outcome.ttft(0.99), 3),
        imbalance=round(outcome.imbalance, 3),
        sustainable_load=None if sustained is None else round(sustained, 3),
        load=load,
        ttft_s_p90=round(outcome.ttft(0.9), 3),
        request_imbalance=round(outcome.request_imbalance, 3),
        refused=outcome.refused,
        model=model,
        synthetic=trace.synthetic,
    )
    return row, outcome
