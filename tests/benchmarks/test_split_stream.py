"""Routers that share workers choose as one would, where they tell each other what they have in flight."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.replay.cluster import Cluster
from benchmarks.replay.scenario import Scenario, Speed
from benchmarks.split_stream import RATES, ROWS, Opinions, Routers, main, measure
from benchmarks.traces.arrivals import spread
from benchmarks.traces.trace import Session, Trace, Turn
from router.pair_cost import PairCost

PAGE = 64


def trace(at_s: list[float]) -> Trace:
    """Prompts of every length, a user's longer and longer, at these times."""
    users = 9
    turns: dict[str, list[Turn]] = {}
    for number, arrived_s in enumerate(at_s):
        user, turn = number % users, number // users
        talk = 100_000 * (1 + user) + 1000 * (turn // 6)
        ids = [1, *range(talk, talk + 4 + 3 * (number * 7 % 11) + 8 * (turn % 6))]
        turns.setdefault(f"user-{user}", []).append(
            Turn(number=number, prompt_tokens=len(ids) * PAGE + 5, output_tokens=20, ids=ids, at_s=arrived_s)
        )
    return Trace(
        name="small", synthetic=True, page_tokens=PAGE, sessions=[Session(name, made) for name, made in turns.items()]
    )


EVENLY = trace([number * 0.06 for number in range(180)])
TOGETHER = trace([number // 10 * 0.6 for number in range(180)])
RATE = 1.2
"""Times EVENLY's: at its own, two routers that tell each other nothing are seldom in each other's way."""
SCENARIO = Scenario(workers=4, capacity_tokens=1000 * PAGE, speed=Speed(7000, 1.0), page_tokens=PAGE)


@cache
def row(routers: Routers, seed: int = 0) -> dict[str, Any]:
    return measure(EVENLY, replace(SCENARIO, seed=seed), RATE, routers)


def deaf(column: str) -> float:
    """The mean of what two routers come to that tell each other nothing: what they draw is most of it."""
    return fmean(row(Routers(2, gossip=False), seed)[column] for seed in range(3))


def test_one_router_has_nobody_to_ask() -> None:
    alone = row(Routers(1))

    assert (alone["asked"], alone["agreement"], alone["same"], alone["gossip"]) == (0, None, None, False)
    outcome = Cluster(SCENARIO, PairCost.name).open_loop(EVENLY, RATE)
    assert alone["ttft_s_mean"] == round(outcome.ttft_mean, 3)


def test_routers_that_tell_each_other_agree_more_than_those_that_do_not() -> None:
    told = row(Routers(2))

    assert told["asked"] == deaf("asked") == 180
    assert told["agreement"] > 0.85
    assert deaf("agreement") < told["agreement"] - 0.03
    assert told["same"] <= told["agreement"]


def test_each_choice_asks_all_other_routers() -> None:
    assert measure(trace([0.5 * number for number in range(8)]), SCENARIO, 1.0, Routers(4))["asked"] == 8 * 3


def test_with_gossip_requests_wait_hardly_longer_than_with_one_router() -> None:
    one, told = (row(routers)["ttft_s_mean"] for routers in (Routers(1), Routers(2)))

    assert told < 1.05 * one
    assert deaf("ttft_s_mean") > 1.1 * told


def test_requests_of_one_moment_are_chosen_for_before_any_gossip() -> None:
    evenly, together = (measure(one, SCENARIO, 1.0, Routers(2))["agreement"] for one in (EVENLY, TOGETHER))

    assert together < evenly


def test_a_worker_within_the_tolerance_is_an_equal() -> None:
    # Nobody holds anything and nobody is busy: any worker is as good as any other.
    opinions = Opinions(SCENARIO)
    cluster = Cluster(SCENARIO, PairCost.name, routers=2, watch=opinions.watch)
    opinions.others = cluster.routers

    cluster.open_loop(trace([20.0 * number for number in range(9)]), 1.0)

    assert opinions.agreement == 1
    assert opinions.equal > 0


# Spread


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40).map(sorted))
def test_spread_requests_keep_their_order_and_come_before_the_next_moment(moments: list[int]) -> None:
    before = trace([float(moment) for moment in moments])

    arrivals = spread(before).arrivals()

    assert [turn.number for _, _, turn in arrivals] == list(range(len(moments)))
    for (at_s, _, _), moment in zip(arrivals, moments, strict=True):
        later = [other for other in moments if other > moment]
        assert moment <= at_s < (later[0] if later else moment + 1)
    if moments[0] < moments[-1]:
        first = [at_s for at_s, _, turn in arrivals if moments[turn.number] == moments[0]]
        assert len(set(first)) == len(first)


# The command


def test_the_command_prints_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "small.jsonl"
    lines = [
        {"timestamp": 100 * number, "input_length": 1100, "output_length": 4, "hash_ids": [0, number % 3, 9 + number]}
        for number in range(6)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    assert main([str(path), "--json"]) == 0

    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["rows"]) == 2 * len(RATES) * len(ROWS)
    assert {row["routers"] for row in result["rows"]} == {routers.number for routers in ROWS}


def test_a_folder_without_the_trace_takes_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2

    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("split_stream: ")
