"""What is counted as served within the objectives, and what was asked."""

from __future__ import annotations

import pytest

from benchmarks.decode_itl import Phase, in_words, phases, within
from benchmarks.goodput import GROUPS, PREFIX_TOKENS, QUESTION_TOKENS, Load, met, row
from benchmarks.streams import Stream, percentile


def stream(ttft_s: float, *gaps_s: float, error: str = "") -> Stream:
    tokens_s = [10.0 + ttft_s]
    for gap in gaps_s:
        tokens_s.append(tokens_s[-1] + gap)
    return Stream(10.0, tokens_s, error)


def test_a_request_meets_both_objectives_or_does_not_count() -> None:
    fine, late, slow = stream(0.4, 0.02, 0.02), stream(0.6, 0.02), stream(0.4, 0.02, 0.05)
    broken, nothing = stream(0.4, 0.02, error="503"), Stream(10.0, [], "no token")
    assert [met(one) for one in (fine, late, slow, broken, nothing)] == [True, False, False, False, False]
    told = row("mainstem", Load(2.0, 5.0, 3, "one"), [fine, late, slow, broken, nothing])
    assert (told["requests"], told["failed"], told["met"], told["goodput"]) == (5, 2, 0.2, 0.2)
    assert told["ttft_p50_ms"] == pytest.approx(400)


def test_every_system_is_sent_requests_of_the_same_shape_and_no_two_runs_share_a_prefix() -> None:
    seeds = (("one", 4.0), ("one", 4.0), ("one", 6.0), ("two", 4.0))
    first, again, other, elsewhere = (Load(rate, 20.0, 3, seed).requests() for seed, rate in seeds)
    assert first == again
    assert 40 < len(first) < 130
    assert [at for at, _ in first] == sorted(at for at, _ in first)
    assert {len(prompt) for _, prompt in first} == {PREFIX_TOKENS + QUESTION_TOKENS}
    assert [at for at, _ in first] == [at for at, _ in elsewhere]
    assert groups(first) == groups(elsewhere)
    prefixes = [{tuple(prompt[:PREFIX_TOKENS]) for _, prompt in load} for load in (first, other, elsewhere)]
    assert all(1 < len(one) <= GROUPS for one in prefixes)
    assert len(set.union(*prefixes)) == sum(map(len, prefixes))


def groups(requests: list[tuple[float, list[int]]]) -> list[int]:
    """Of each request, the first one that shared its prefix."""
    beginnings = [tuple(prompt[:PREFIX_TOKENS]) for _, prompt in requests]
    return [beginnings.index(one) for one in beginnings]


def test_gaps_belong_to_the_phase_in_which_both_tokens_came() -> None:
    one = stream(1.0, 0.5, 0.5, 0.5)  # Tokens at 11.0, 11.5, 12.0 and 12.5.
    assert within([one], 11.4, 12.1) == [0.5]
    assert within([one], 0, 99) == [0.5] * 3
    quiet = Phase([0.01] * 99 + [0.02], [{"gap_ms": 10.0}] * 3)
    disturbed = Phase([0.01] * 98 + [0.03] * 2, [{"gap_ms": 10.0}, {"gap_ms": 15.0}], [one])
    told = phases({"quiet": quiet, "handed over to": disturbed})
    assert [(row["itl_p99_ms"], row["p99_ratio"], row["handoffs"]) for row in told.values()] == [
        (20.0, 1.0, 0),
        (30.0, 1.5, 1),
    ]
    assert [(row["step_p99_ms"], row["step_p99_ratio"]) for row in told.values()] == [(10.0, 1.0), (15.0, 1.5)]


def test_percentiles_are_of_the_nearest_rank() -> None:
    assert [percentile([3, 1, 2], share) for share in (0.0, 0.5, 0.99, 1.0)] == [1, 2, 3, 3]
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 0.5)


def test_a_stream_that_speaks_in_parts_of_characters_says_nothing_of_gaps() -> None:
    tokens_s = [10.0 + number for number in range(200)]
    spoken, halves = Stream(9.0, tokens_s, wordless=2), Stream(9.0, tokens_s, wordless=100)
    assert [in_words(one) for one in (spoken, halves)] == [True, False]
