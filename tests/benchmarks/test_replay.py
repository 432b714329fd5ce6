"""Replays of small generated traces: what goes in comes out, once, and the same each time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.replay import feed as feed_module
from benchmarks.replay.__main__ import main
from benchmarks.replay.cluster import ORACLE, Cluster
from benchmarks.replay.objective import Objective
from benchmarks.replay.row import measure, replay
from benchmarks.replay.scenario import Scenario, Speed
from benchmarks.replay.search import CLOSE, LEAST, MOST, largest_count, largest_rate
from benchmarks.replay.suite import EVERYBODY, first_part
from benchmarks.traces.trace import Session, Trace, Turn
from router.policies import POLICIES
from transfer.wire import Published, decode_page_message, decode_published

PAGE = 64
STEP_S = 0.02


def turn(number: int, pages: int, own: int, at_s: float | None, think_s: float = 0.0, shared: int = 4) -> Turn:
    """A prompt of so many pages, of which the first `shared` are everybody's and the others those of `own`."""
    ids = [*range(1, shared + 1), *(1000 * (own + 1) + place for place in range(shared, pages))]
    tokens = pages * PAGE + 7
    return Turn(number=number, prompt_tokens=tokens, output_tokens=5, ids=ids[:pages], at_s=at_s, think_s=think_s)


def open_trace(requests: int = 60, every_s: float = 0.05, users: int = 7) -> Trace:
    """Users that send longer and longer prompts, by the clock."""
    sessions = [
        Session(
            f"user-{user}",
            [
                turn(number, 6 + 2 * (number // users), user, number * every_s)
                for number in range(user, requests, users)
            ],
        )
        for user in range(users)
    ]
    return Trace(name="small", synthetic=True, page_tokens=PAGE, sessions=sessions)


def closed_trace(sessions: int, turns: int, think_s: float) -> Trace:
    return Trace(
        name="small",
        synthetic=True,
        page_tokens=PAGE,
        sessions=[
            Session(
                f"agent-{agent}",
                [turn(agent * turns + place, 6 + 2 * place, agent, None, think_s) for place in range(turns)],
            )
            for agent in range(sessions)
        ],
    )


def scenario(
    workers: int = 3, prefill: int = 0, decode: int = 0, pages: int = 1000, tokens_per_s: float = 5000
) -> Scenario:
    return Scenario(
        workers=workers,
        prefill=prefill,
        decode=decode,
        capacity_tokens=pages * PAGE,
        speed=Speed(tokens_per_s, 1.0),
        page_tokens=PAGE,
    )


def idle(cluster: Cluster) -> bool:
    """Whether neither the router nor a worker has anything under way."""
    return all(
        worker.inflight_requests == worker.outstanding_prefills == worker.inflight_tokens == 0
        for router in cluster.routers
        for worker in router.fleet
    ) and all(worker.running_requests == worker.queued_uncached_tokens == 0 for worker in cluster.workers.values())


def known_wrongly(cluster: Cluster, trace: Trace) -> list[tuple[str, int]]:
    """(worker, request) for which the index says something else than the worker's own cache; and totals that differ."""
    wrong = []
    (router,) = cluster.routers
    for name, worker in cluster.workers.items():
        if router.index.held(name) != worker.cache.held:
            wrong.append((name, -1))
        for session in trace.sessions:
            for one in session.turns:
                if router.index.match(one.ids).get(name, 0) != worker.held(one.ids):
                    wrong.append((name, one.number))
    return wrong


# Requests


@pytest.mark.parametrize("pairs", [(0, 0), (6, 2)])
@pytest.mark.parametrize("policy", [*POLICIES, ORACLE])
def test_every_request_has_one_first_token_and_ends(policy: str, pairs: tuple[int, int]) -> None:
    trace = open_trace()
    cluster = Cluster(scenario(3, *pairs), policy)
    told: list[int] = []

    outcome = cluster.open_loop(trace, 1.0, tell=told.append)

    assert told == list(range(1, trace.requests + 1))
    assert sum(outcome.sent.values()) == trace.requests
    assert outcome.prompt_tokens == sum(one.prompt_tokens for session in trace.sessions for one in session.turns)
    assert sum(outcome.computed.values()) == outcome.prompt_tokens - outcome.cached_tokens
    assert min(outcome.ttft_s) > 0
    assert not outcome.refused
    assert not outcome.cut
    assert idle(cluster)


def test_pairs_compute_on_prefill_workers_and_answer_on_decode_workers() -> None:
    cluster = Cluster(scenario(0, 6, 2), "mainstem")

    outcome = cluster.open_loop(open_trace(), 1.0)

    assert set(outcome.workers) == {f"prefill-{number}" for number in range(6)}
    assert set(outcome.sent) <= set(outcome.workers)
    assert len(outcome.sent) > 1
    assert {name for name, worker in cluster.workers.items() if worker.cache.held} >= {"decode-0", "decode-1"}


def test_a_request_that_fits_nowhere_is_refused_and_the_others_go_on() -> None:
    trace = open_trace(8)
    huge = Session("huge", [turn(8, 200, 99, 0.1)])
    cluster = Cluster(scenario(2, pages=100), "mainstem")

    outcome = cluster.open_loop(
        Trace(name="small", synthetic=True, page_tokens=PAGE, sessions=[*trace.sessions, huge]), 1.0
    )

    assert outcome.refused == 1
    assert len(outcome.ttft_s) == 8
    assert idle(cluster)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("model", ["sglang", "fifo"])
def test_equal_inputs_and_seeds_give_equal_outcomes(model: str, closed: bool) -> None:
    trace = closed_trace(9, 3, 0.2) if closed else open_trace()

    assert replay(trace, scenario(), "mainstem", model, 2.0) == replay(trace, scenario(), "mainstem", model, 2.0)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "mainstem"])
def test_what_is_learned_changes_no_choice_of_the_others(policy: str) -> None:
    """So that a replay of them need not learn, as the real router does."""
    frozen, learning = (Cluster(scenario(3, 2, 2), policy, learn=learn) for learn in (None, True))

    outcomes = [cluster.open_loop(open_trace(), 1.0) for cluster in (frozen, learning)]

    assert outcomes[0] == outcomes[1]
    assert [router.placement.model.config.learn for router in (*frozen.routers, *learning.routers)] == [False, True]


def test_another_seed_gives_another_choice_among_equals() -> None:
    first = [
        next(iter(Cluster(replace(scenario(8), seed=seed), "mainstem").open_loop(open_trace(1), 1.0).sent))
        for seed in range(8)
    ]

    assert len(set(first)) > 1


def test_requests_of_the_same_moment_are_computed_together() -> None:
    sessions = [Session(str(number), [turn(number, 6, number, 1.0, shared=0)]) for number in range(3)]

    outcome = Cluster(scenario(1), "round_robin").open_loop(
        Trace(name="small", synthetic=True, page_tokens=PAGE, sessions=sessions), 1.0
    )

    assert len(set(outcome.ttft_s)) == 1


def test_a_rate_of_two_halves_the_time_between_arrivals() -> None:
    outcome = Cluster(scenario(), "least_load").open_loop(open_trace(20, 0.4), 2.0)

    assert sorted(outcome.arrived_s) == pytest.approx([number * 0.2 for number in range(20)])


# Closed loop


@pytest.mark.parametrize("model", ["sglang", "fifo"])
def test_a_closed_loop_has_as_many_sessions_under_way_as_lanes(model: str) -> None:
    # Three turns with two thoughts of 100 s: after 200 s four new sessions begin, and after 400 s the last two.
    outcome = replay(closed_trace(10, 3, 100.0), scenario(), "mainstem", model, 4)

    def arrived(after_s: float, before_s: float) -> int:
        return sum(after_s <= at_s < before_s for at_s in outcome.arrived_s)

    waves = [arrived(100.0 * wave, 100.0 * wave + 50) for wave in range(9)]
    assert waves == [4, 4, 8, 4, 6, 2, 2, 0, 0]


def test_requests_in_flight_are_never_more_than_lanes() -> None:
    cluster = Cluster(scenario(), "mainstem")
    inflight: list[int] = []

    cluster.closed_loop(
        closed_trace(20, 2, 0.01),
        5,
        tell=lambda done: inflight.append(sum(worker.inflight_requests for worker in cluster.routers[0].fleet)),
    )

    assert len(inflight) == 40
    assert max(inflight) == 5


def test_a_turn_follows_the_answer_before_it_and_its_think_time() -> None:
    outcome = Cluster(scenario(1), "mainstem").closed_loop(closed_trace(1, 5, 3.0), 1)

    answered_s = [
        arrived_s + ttft_s + 4 * STEP_S for arrived_s, ttft_s in zip(outcome.arrived_s, outcome.ttft_s, strict=True)
    ]
    assert outcome.arrived_s[1:] == pytest.approx([at_s + 3.0 for at_s in answered_s[:-1]])


# Page events


@pytest.mark.parametrize("pairs", [(0, 0), (4, 2)])
def test_the_index_ends_up_with_what_the_workers_hold(pairs: tuple[int, int]) -> None:
    # So few pages that caches evict all the time.
    trace = open_trace(100, 0.3)
    cluster = Cluster(scenario(3, *pairs, pages=110), "mainstem")

    outcome = cluster.open_loop(trace, 1.0)

    assert not outcome.refused
    assert any(worker.cache.held for worker in cluster.workers.values())
    assert outcome.cached_tokens < Cluster(scenario(3, *pairs), "mainstem").open_loop(trace, 1.0).cached_tokens
    assert known_wrongly(cluster, trace) == []


def test_page_events_travel_as_bytes_of_the_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    arrived: list[object] = []

    def seen(decode: Callable[[bytes], object], data: bytes) -> object:
        arrived.append(data)
        return decode(data)

    monkeypatch.setattr(feed_module, "decode_page_message", partial(seen, decode_page_message))
    monkeypatch.setattr(feed_module, "decode_published", partial(seen, decode_published))
    cluster = Cluster(scenario(), "mainstem")
    cluster.open_loop(open_trace(), 1.0)

    assert all(type(data) is bytes for data in arrived)
    # Every batch, and for each worker's first question an empty snapshot and its end.
    assert len(arrived) == sum(source.journal.sequence for source in cluster.sources.values()) + 2 * len(
        cluster.sources
    )


def test_batches_that_are_lost_are_asked_for_again_where_agents_keep_in_touch() -> None:
    trace = open_trace()

    def lost(feed: feed_module.Feed, message: Published, now_s: float) -> bool:
        return now_s < 3.0

    deaf, mended = (Cluster(scenario(), "mainstem", lost=lost) for _ in range(2))
    mended.keep_in_touch()
    # The last request ends long after the rest, so that there is time for what the agents say.
    late = Session("late", [turn(60, 6, 60, 30.0)])
    for cluster in (deaf, mended):
        cluster.open_loop(Trace(name="small", synthetic=True, page_tokens=PAGE, sessions=[*trace.sessions, late]), 1.0)

    assert known_wrongly(deaf, trace) != []
    assert known_wrongly(mended, trace) == []


# Objectives and searches


def test_a_hopeless_run_is_cut() -> None:
    trace = open_trace(200, 0.001)
    objective = Objective(0.05, trace.requests)

    outcome = Cluster(scenario(1, tokens_per_s=500), "mainstem").open_loop(trace, 1.0, objective)

    assert outcome.cut
    assert len(outcome.ttft_s) < trace.requests
    assert objective.missed


def test_a_run_within_its_objective_is_not_cut() -> None:
    trace = open_trace(40, 0.2)

    outcome = Cluster(scenario(), "mainstem").open_loop(trace, 1.0, Objective(5.0, trace.requests))

    assert not outcome.cut
    assert len(outcome.ttft_s) == 40


@given(threshold=st.floats(LEAST * 1.2, MOST / 1.2), guess=st.floats(LEAST, MOST))
def test_the_largest_rate_is_the_threshold_within_two_percent(threshold: float, guess: float) -> None:
    found = largest_rate(lambda rate: rate <= threshold, guess)

    assert found <= threshold <= found * CLOSE


@given(most=st.integers(1, 500), threshold=st.integers(0, 600), guess=st.integers(1, 600))
def test_the_largest_count_is_the_threshold_within_two_percent(most: int, threshold: int, guess: int) -> None:
    tried: list[int] = []

    def keeps(count: int) -> bool:
        tried.append(count)
        return count <= threshold

    found = largest_count(keeps, guess, most)

    wanted = min(most, threshold)
    assert found <= wanted <= max(found + 1, found * CLOSE)
    assert wanted < 50 or found > 0
    assert all(1 <= count <= most for count in tried)
    if wanted < 50:
        assert found == wanted


@settings(max_examples=10)
@given(st.floats(0.001, LEAST / 2))
def test_where_the_least_rate_is_too_much_none_is_sustained(threshold: float) -> None:
    assert largest_rate(lambda rate: rate <= threshold, 1.0) == 0.0


def test_what_is_sustained_keeps_the_objective_and_a_little_more_does_not() -> None:
    trace, fleet = open_trace(120, 0.05), scenario(1, tokens_per_s=3000)
    row, _ = measure(trace, fleet, "mainstem", "sglang", 1.0)

    assert row.sustainable_load is not None
    assert replay(trace, fleet, "mainstem", "sglang", row.sustainable_load).ttft(0.9) <= 1.01
    assert replay(trace, fleet, "mainstem", "sglang", row.sustainable_load * 1.1).ttft(0.9) > 1.0


@pytest.mark.parametrize("parts", [1, 3])
def test_the_first_part_of_a_trace_is_its_first_arrivals(parts: int) -> None:
    trace = open_trace(60)

    kept = first_part(trace, parts)

    assert [one for _, _, one in kept.arrivals()] == [one for _, _, one in trace.arrivals()[: kept.requests]]
    assert kept.requests == -(-60 // parts)


# The command


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.jsonl"
    lines = [
        {"timestamp": 100 * number, "input_length": 1100, "output_length": 4, "hash_ids": [0, number % 3, 9 + number]}
        for number in range(12)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_command_prints_a_row_for_each_policy_and_draws(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    png = tmp_path / "out.png"
    words = ["--trace", str(file), "--policy", "mainstem,oracle", "--workers", "2", "--json", "--plot", str(png)]

    assert main(words) == 0

    *rows, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["policy"] for row in rows] == ["mainstem", "oracle"]
    assert all(row["trace"] == "small" and row["workers"] == 2 and row["ttft_s_mean"] > 0 for row in rows)
    assert "machine" in last
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_command_takes_pairs(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--trace", str(file), "--policy", "mainstem", "--pairs", "6x2", "--json"]) == 0

    assert json.loads(capsys.readouterr().out.splitlines()[0])["workers"] == 8


def test_workers_are_as_slow_as_they_are_told_to_be_in_turn(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def mean_ttft_s(slowness: str) -> float:
        assert main(["--trace", str(file), "--policy", "round_robin", "--slowness", slowness, "--json"]) == 0
        found: float = json.loads(capsys.readouterr().out.splitlines()[0])["ttft_s_mean"]
        return found

    assert mean_ttft_s("1") < mean_ttft_s("1,4") < mean_ttft_s("4")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--policy", "luck"], "found 'luck'"),
        (["--slowness", "1,0"], "found '1,0'"),
        (["--slowness", "fast"], "found 'fast'"),
        (["--slowness", "1,2", "--model", "fifo"], "--model fifo"),
        (["--pairs", "6"], "found '6'"),
        (["--pairs", "0x2"], "found '0x2'"),
        (["--trace", "absent.jsonl"], "absent.jsonl"),
        (["--suite", "absent"], "mooncake_conversation_trace"),
        (["--page-tokens", "100"], "100"),
    ],
)
def test_what_is_wrong_takes_one_line(
    file: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"--trace", "--suite"} & set(words)

    assert main([*([] if named else ["--trace", str(file)]), *words]) == 2

    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("replay: ")
    assert said in lines[0]


def test_a_file_that_is_no_trace_takes_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"timestamp": 1, "hash_ids": "none"}\n')

    assert main(["--trace", str(path)]) == 2

    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "bad.jsonl" in lines[0]


def test_everybody_is_every_policy_and_the_oracle() -> None:
    assert set(EVERYBODY) == {*POLICIES, ORACLE}
