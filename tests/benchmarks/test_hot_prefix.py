"""The hot-prefix workload tells apart who copies a hot prefix and who leaves it where it is."""

from __future__ import annotations

import pytest

from benchmarks.hot_prefix import CAPACITY_TOKENS, SHAPES, STARTS, HotCluster, Shape, Start, measure, workload
from benchmarks.replay.scenario import USUAL, Scenario
from router.config import CostConfig


class WithoutCopies(Scenario):
    """No prefix is ever hot."""

    @property
    def cost(self) -> CostConfig:
        return super().cost.model_copy(update={"hot_requests": 1_000_000})


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_ours_shares_the_prefix_and_keeps_the_hits(shape: Shape, start: Start) -> None:
    row = measure("mainstem", 8, 64, shape, start)

    assert row["request_imbalance"] < 1.5
    assert row["hit_rate"] > 0.9
    assert row["decisions"]["copied"] >= 3


def test_the_longest_prefix_stays_with_the_one_warm_worker() -> None:
    row = measure("longest_prefix", 8, 64, SHAPES[0], "warm one")

    assert row["request_imbalance"] == 4
    assert row["hit_rate"] > 0.9


def test_without_its_rule_for_copies_ours_would_leave_it_there_too() -> None:
    scenario = WithoutCopies(workers=4, capacity_tokens=CAPACITY_TOKENS, speed=USUAL, page_tokens=64)
    cluster = HotCluster(scenario, "mainstem")

    outcome = cluster.clients(workload(8, 64, "warm one"), "warm one")

    assert outcome.request_imbalance == 4
    assert not cluster.decisions["copied"]


@pytest.mark.parametrize("start", STARTS)
def test_every_request_counts_the_one_that_warms_too(start: Start) -> None:
    trace = workload(8, 64, start)
    cluster = HotCluster(Scenario(workers=4, capacity_tokens=CAPACITY_TOKENS, speed=USUAL, page_tokens=64), "mainstem")

    outcome = cluster.clients(trace, start)

    warming = int(start == "warm one")
    assert trace.requests == 512 + warming
    assert sum(outcome.sent.values()) == cluster.decisions.total() == len(outcome.ttft_s) == trace.requests
    assert outcome.arrived_s.count(0.0) == (1 if warming else 8)


def test_no_client_of_a_warm_start_begins_before_the_first_answer() -> None:
    cluster = HotCluster(Scenario(workers=4, capacity_tokens=CAPACITY_TOKENS, speed=USUAL, page_tokens=64), "mainstem")

    outcome = cluster.clients(workload(8, 64, "warm one"), "warm one")

    first_s, second_s, *_ = sorted(outcome.arrived_s)
    assert first_s + outcome.ttft_s[0] < second_s
    assert outcome.hits[0] == 0
    assert outcome.hits[1] > 0
