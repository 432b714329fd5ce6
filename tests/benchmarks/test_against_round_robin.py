"""Which loads count as stable, and that ours is compared with the same requests at these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.against_round_robin import (
    CLOSED_LOADS,
    OPEN_LOADS,
    SOURCES,
    WORKERS,
    Cell,
    Source,
    beginning,
    cells,
    is_stable,
    main,
    measure,
    worst,
)
from benchmarks.replay.outcome import Outcome
from benchmarks.traces.trace import Session, Trace, Turn

PAGE_TOKENS = 512


def outcome(ttft_s: list[float]) -> Outcome:
    """One request a second."""
    found = Outcome(["worker-0"])
    for place, seconds in enumerate(ttft_s):
        found.first_token("worker-0", float(place), place + seconds, 100, 0)
    return found


def trace(sessions: int, turns: int, closed: bool) -> Trace:
    """Turns of the sessions by turns, one a second where they have times."""
    return Trace(
        name="small",
        synthetic=True,
        page_tokens=PAGE_TOKENS,
        sessions=[
            Session(
                str(session),
                [
                    Turn(
                        number=place * sessions + session,
                        prompt_tokens=1,
                        output_tokens=1,
                        ids=(),
                        at_s=None if closed else float(place * sessions + session),
                    )
                    for place in range(turns)
                ],
            )
            for session in range(sessions)
        ],
    )


def recorded(folder: Path, name: str, every_ms: int, users: int = 3, requests: int = 240) -> Path:
    """Conversations that grow by a block a turn, in Mooncake's format, by name."""
    lines = []
    for number in range(requests):
        user, blocks = number % users, 2 + number // users // 4
        lines.append(
            json.dumps(
                {
                    "timestamp": number * every_ms,
                    "input_length": blocks * PAGE_TOKENS,
                    "output_length": 4,
                    "hash_ids": [1000 * user + place for place in range(blocks)],
                }
            )
        )
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines))
    return path


# Stable loads


def test_a_load_is_stable_while_first_tokens_come_about_as_soon_as_before() -> None:
    assert is_stable(outcome([1.0] * 50 + [1.49] * 50), closed=False)
    assert not is_stable(outcome([1.0] * 50 + [1.51] * 50), closed=False)


def test_nobody_falls_behind_in_a_closed_loop() -> None:
    assert is_stable(outcome([1.0] * 50 + [9.0] * 50), closed=True)


@pytest.mark.parametrize("closed", [False, True])
def test_where_a_request_was_refused_the_load_is_not_stable(closed: bool) -> None:
    refused = outcome([1.0] * 100)
    refused.refused = 1

    assert not is_stable(refused, closed)


# What is replayed


def test_the_beginning_of_arrivals_is_the_earliest_requests() -> None:
    part = beginning(trace(sessions=10, turns=6, closed=False), 25, lanes=0)

    assert [turn.number for _, _, turn in part.arrivals()] == list(range(25))
    assert part.synthetic


def test_the_beginning_of_sessions_keeps_all_lanes_busy_twice() -> None:
    part = beginning(trace(sessions=10, turns=6, closed=True), 24, lanes=4)

    assert len(part.sessions) == 8
    assert {len(session.turns) for session in part.sessions} == {3}


def test_every_trace_is_replayed_on_every_fleet_at_every_load(tmp_path: Path) -> None:
    for source in SOURCES:
        (tmp_path / f"{source.name}.csv").touch()

    wanted = cells(tmp_path)

    assert len({(cell.source.name, cell.workers, cell.load) for cell in wanted}) == len(wanted)
    assert len(wanted) == len(WORKERS) * (3 * len(OPEN_LOADS) + len(CLOSED_LOADS))


def test_a_folder_without_a_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"wanted mooncake_conversation_trace in .*, found none"):
        cells(tmp_path)
    with pytest.raises(SystemExit) as refused:
        main([str(tmp_path)])
    assert refused.value.code == 2


# Rows


def row(tmp_path: Path, every_ms: int, load: float = 1.0) -> dict[str, Any]:
    path = recorded(tmp_path, "small", every_ms)
    found = measure(Cell(path, Source("small", (load,)), 2, load))
    assert found is not None
    return found


def test_a_row_has_the_ratio_of_what_both_came_to(tmp_path: Path) -> None:
    found = row(tmp_path, every_ms=8000)

    assert found["stable"]
    assert found["in_time"]
    assert found["rate"] == 0.25
    assert found["requests"] == 240
    turns, ours = found["round_robin"], found["mainstem"]
    assert found["mean_ratio"] == pytest.approx(ours["ttft_s_mean"] / turns["ttft_s_mean"], abs=1e-3)
    assert found["p99_ratio"] == pytest.approx(ours["ttft_s_p99"] / turns["ttft_s_p99"], abs=1e-3)
    # Three users take turns at two workers: each comes back to the worker that it did not come to before.
    assert ours["hit_rate"] > turns["hit_rate"]
    assert found["mean_ratio"] < 1


def test_where_round_robin_falls_behind_nothing_is_compared(tmp_path: Path) -> None:
    found = row(tmp_path, every_ms=1, load=8.0)

    assert not found["stable"]
    assert found["mainstem"] is None
    assert found["mean_ratio"] is None


def test_the_worst_row_is_a_stable_one() -> None:
    rows: list[dict[str, Any]] = [{"stable": True, "r": 0.9}, {"stable": True, "r": 1.1}, {"stable": False, "r": None}]

    assert worst(rows, "r") == {"stable": True, "r": 1.1}
    assert worst(rows[2:], "r") is None
