"""Faults reach the index where nothing mends them, and where they are mended it is right again soon."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.index_faults import ROWS, Agreement, Faults, FaultyRun, main, measure
from benchmarks.replay.scenario import Scenario, Speed
from benchmarks.traces.trace import Session, Trace, Turn

PAGE = 64
REQUESTS, EVERY_S, USERS = 360, 0.15, 4
WINDOW_S = (REQUESTS - 1) * EVERY_S / 3


def small_trace() -> Trace:
    """Users that talk on and on until they begin anew, one request after the other, for 54 seconds."""
    sessions: dict[str, list[Turn]] = {}
    for number in range(REQUESTS):
        user, turn = number % USERS, number // USERS
        talk = 100_000 * (1 + user) + 1000 * (turn // 10)
        pages = 8 + 4 * (turn % 10)
        ids = [1, 2, *range(talk, talk + pages)]
        sessions.setdefault(f"user-{user}", []).append(
            Turn(number=number, prompt_tokens=len(ids) * PAGE + 5, output_tokens=4, ids=ids, at_s=number * EVERY_S)
        )
    return Trace(
        name="small",
        synthetic=True,
        page_tokens=PAGE,
        sessions=[Session(name, turns) for name, turns in sessions.items()],
    )


def scenario() -> Scenario:
    # Caches that evict all the time.
    return Scenario(workers=3, capacity_tokens=400 * PAGE, speed=Speed(20_000, 1.0), page_tokens=PAGE)


@cache
def replayed(faults: Faults) -> tuple[FaultyRun, dict[str, Any]]:
    trace = small_trace()
    run = FaultyRun(scenario(), faults, WINDOW_S, 2 * WINDOW_S)
    return run, run.row(run.replayed(trace))


def ends_exact(run: FaultyRun) -> bool:
    (router,) = run.cluster.routers
    return all(
        router.index.sample(name, 1, 0) == set(run.cluster.sources[name].journal.held)
        and router.index.held(name) == worker.cache.held
        for name, worker in run.cluster.workers.items()
    )


NONE = Faults(name="none")
LOST = Faults(name="lost", lost_share=0.5)
UNMENDED = Faults(name="unmended", lost_share=0.2, unmended=True)


def test_without_faults_the_index_is_right_at_every_decision() -> None:
    run, row = replayed(NONE)

    assert (row["decisions"], row["decisions_off"], row["pages_off"]) == (REQUESTS // 3, 0, 0)
    assert (row["below_s"], row["back_s_max"], row["audits_refuted"]) == (0, 0, 0)
    assert row["lost_batches"] == row["lost_audits"] == row["restarts"] == 0
    assert row["hit_rate_meanwhile"] > 0.5
    assert ends_exact(run)


def test_what_is_lost_is_missed_where_no_question_is_answered() -> None:
    _, none = replayed(NONE)
    run, row = replayed(UNMENDED)

    assert row["decisions_off"] > 0.3 * row["decisions"]
    assert row["agreement_min"] < 0.5
    assert row["back_s_max"] > 0.8 * WINDOW_S
    assert row["hit_rate_meanwhile"] < none["hit_rate_meanwhile"] - 0.02
    # Answered again from the end of the faults on.
    assert ends_exact(run)


def test_lost_batches_are_made_good_before_many_choices_see_it() -> None:
    _, unmended = replayed(UNMENDED)
    run, row = replayed(LOST)

    assert row["lost_batches"] > 20
    assert row["lost_audits"] > 0
    assert 0 < row["decisions_off"] < 0.3 * unmended["decisions_off"]
    assert 0 < row["healed_s_p50"] <= row["healed_s_max"] < 4
    assert row["back_s_max"] <= 10
    assert row["audits_refuted"] == 0
    assert ends_exact(run)


def test_restarted_workers_are_known_to_be_empty_and_then_what_they_hold() -> None:
    run, row = replayed(Faults(name="restarts", restart_every_s=6, down_s=3, lost_share=0.2))

    assert row["restarts"] == 3
    assert [worker.epoch for worker in run.cluster.workers.values()] == [2, 2, 2]
    assert row["agreement_min"] == 0
    assert 0 < row["back_s_max"] <= 10
    assert ends_exact(run)


def test_agreement_is_back_when_it_is_seen_again_counted_from_the_fault() -> None:
    agreement = Agreement()
    agreement.looked(1.0, 1.0)
    agreement.fault_s = 1.5
    for share, now_s in ((0.98, 2.0), (0.5, 3.0), (0.995, 4.0), (1.0, 5.0)):
        agreement.looked(share, now_s)

    assert (agreement.least, agreement.below_s, agreement.back_s) == (0.5, 2.0, 2.5)


def test_equal_seeds_lose_the_same() -> None:
    _, row = replayed(LOST)

    assert measure(small_trace(), scenario(), LOST) == row


def test_the_command_prints_every_row_as_recorded_and_spread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.jsonl"
    lines = [
        {
            "timestamp": 3000 * (number // 4),
            "input_length": 1100,
            "output_length": 4,
            "hash_ids": [0, number % 3, 9 + number],
        }
        for number in range(12)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    assert main([str(path), "--json"]) == 0

    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = [faults.name for faults in ROWS]
    assert [(row["faults"], row["arrivals"]) for row in result["rows"]] == [
        (name, arrivals) for arrivals in ("recorded", "spread") for name in names
    ]


def test_a_folder_without_the_trace_takes_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2

    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("index_faults: ")
