"""Trace files in, sessions of requests out, and one line for a file that is not what it seems.

All files here are made here. With MAINSTEM_TRACES naming a folder that has them, the published ones are checked too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks import lru
from benchmarks.traces import claude_code
from benchmarks.traces.arrivals import spread
from benchmarks.traces.limits import NO_LIMITS, Limits
from benchmarks.traces.load import load
from benchmarks.traces.trace import Session, Trace, Turn


def write(path: Path, *lines: object) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(zstandard.compress(text.encode()) if path.suffix == ".zst" else text.encode())
    return path


def request(at_ms: int, tokens: int, *blocks: int) -> dict[str, Any]:
    return {"timestamp": at_ms, "input_length": tokens, "output_length": 5, "hash_ids": list(blocks)}


def call(tokens: int, *runs: tuple[int, int], think_s: float | None = 1.0, agent: int | str = 0) -> list[Any]:
    return [0.0, None, think_s, tokens, 7, list(runs), agent]


def coding(name: str, *calls: list[Any], tools: int = 0, system: int = 0) -> dict[str, Any]:
    return {
        "id": name,
        "models": ["m"],
        "block_size": 64,
        "tool_tokens": tools,
        "system_tokens": system,
        "reqs": list(calls),
    }


def chat(name: int, parent: int, at_s: float, tokens: int, *blocks: int) -> dict[str, Any]:
    return {
        "chat_id": name,
        "parent_chat_id": parent,
        "timestamp": at_s,
        "input_length": tokens,
        "output_length": 3,
        "type": "text",
        "turn": 1,
        "hash_ids": list(blocks),
    }


def turns(trace: Trace) -> list[Turn]:
    return sorted((turn for session in trace.sessions for turn in session.turns), key=lambda turn: turn.number)


def common(one: Turn, other: Turn) -> int:
    return next(
        (place for place, pair in enumerate(zip(one.ids, other.ids, strict=False)) if pair[0] != pair[1]),
        min(len(one.ids), len(other.ids)),
    )


# Mooncake


def test_mooncake_ids_cover_whole_pages_and_the_partial_one_stands_apart(tmp_path: Path) -> None:
    trace = load(write(tmp_path / "a.jsonl", request(0, 1100, 0, 1, 2), request(3000, 1024, 0, 1)))
    first, second = turns(trace)

    assert (first.at_s, first.prompt_tokens, first.output_tokens, first.number) == (0.0, 1100, 5, 0)
    assert second.at_s == 3.0
    assert len(first.ids) == 2
    assert first.partial_id not in (None, *first.ids)
    assert list(second.ids) == list(first.ids)
    assert second.partial_id is None
    assert (trace.page_tokens, trace.closed, trace.requests) == (512, False, 2)


def test_a_mooncake_request_continues_the_latest_request_that_it_extends(tmp_path: Path) -> None:
    trace = load(
        write(
            tmp_path / "a.jsonl",
            request(0, 600, 0, 99),  # one whole block, the system prompt's, which proves nothing
            request(0, 1600, 0, 1, 2, 3),  # whole blocks 0 1 2
            request(0, 2100, 0, 1, 2, 4, 5),  # 0 1 2 4: continues the second
            request(1, 1100, 0, 1, 6),  # 0 1: extends neither
            request(2, 2700, 0, 1, 2, 4, 7, 8),  # extends them all, the latest is the one before
            request(3, 1100, 0, 9, 10),  # shares the system prompt alone
        )
    )
    assert [[turn.number for turn in session.turns] for session in trace.sessions] == [[0], [1, 2], [3, 4], [5]]


def test_a_request_that_comes_again_is_of_the_same_session(tmp_path: Path) -> None:
    lines = [request(at, 1100, 0, 1, 2) for at in range(3)]
    assert len(load(write(tmp_path / "a.jsonl", *lines)).sessions) == 1


def test_files_are_other_namespaces(tmp_path: Path) -> None:
    one, other = (load(write(tmp_path / f"{name}.jsonl", request(0, 512, 0))) for name in "ab")
    assert turns(one)[0].ids != turns(other)[0].ids


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst"])
def test_packed_and_plain_files_read_alike(tmp_path: Path, suffix: str) -> None:
    trace = load(write(tmp_path / f"SYNTHETIC_mix.{suffix}", request(0, 512, 0), "", request(9, 512, 0)))
    assert (trace.name, trace.synthetic, trace.requests) == ("SYNTHETIC_mix", True, 2)


def test_larger_pages_are_several_blocks(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", request(0, 2100, 0, 1, 2, 3, 4), request(0, 2048, 0, 1, 2, 9))
    first, second = turns(load(path, page_tokens=1024))

    assert (len(first.ids), len(second.ids), common(first, second)) == (2, 2, 1)
    assert first.partial_id is not None
    with pytest.raises(ValueError, match="wanted pages of a multiple of 512 tokens, found 700"):
        load(path, page_tokens=700)


def test_long_requests_and_later_sessions_are_left_out(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", request(0, 9000, *range(18)), *(request(at, 600, at, 100 + at) for at in range(5))
    )
    trace = load(path, limits=Limits(sessions=3, prompt_tokens=8000))
    assert [turn.number for turn in turns(trace)] == [1, 2, 3]


# Coding sessions


def test_coding_sessions_are_closed_loops_with_think_times(tmp_path: Path) -> None:
    line = coding(
        "a",
        call(1100, (1, 17), think_s=0.0),
        call(1300, (1, 20), think_s=500.0),
        call(1400, (1, 21), think_s=None),
    )
    trace = load(write(tmp_path / "a.jsonl", line))

    assert trace.closed
    assert [turn.think_s for turn in turns(trace)] == [0.0, 60.0, 0.0]
    assert [turn.at_s for turn in turns(trace)] == [None] * 3
    assert [len(turn.ids) for turn in turns(trace)] == [2, 2, 2]  # 8 blocks of 64 a page
    with pytest.raises(ValueError, match="found a closed loop"):
        trace.arrivals()


def test_coding_ids_are_local_but_for_equal_tools_and_system_prompts(tmp_path: Path) -> None:
    lines = [
        coding("a", call(640, (1, 10)), tools=128, system=70),  # 3 shared blocks
        coding("b", call(640, (1, 10)), tools=128, system=70),
        coding("c", call(640, (1, 10)), tools=64, system=134),  # as long, but not the same
        # Local ids are any numbers: these are the same blocks 0 to 2 of "a", and then others.
        coding("d", call(640, (50, 10)), tools=128, system=70),
    ]
    trace = load(write(tmp_path / "a.jsonl", *lines), page_tokens=64)
    first, *others = turns(trace)

    assert len(first.ids) == 10
    assert [common(first, other) for other in others] == [3, 0, 3]


def test_a_call_that_begins_otherwise_shares_as_far_as_it_agrees(tmp_path: Path) -> None:
    lines = [
        coding("a", call(640, (1, 10)), tools=128, system=128),  # 4 shared blocks
        coding("b", call(640, (1, 10)), call(640, (1, 2), (90, 8)), tools=128, system=128),
    ]
    first, _, third = turns(load(write(tmp_path / "a.jsonl", *lines), page_tokens=64))
    assert common(first, third) == 2


def test_sub_agents_are_left_out_unless_wanted(tmp_path: Path) -> None:
    lines = [json.dumps(coding("a", call(640, (1, 10)), call(320, (30, 5), agent="sub"), call(704, (1, 11))))]
    main = claude_code.load(lines, "t", 64, NO_LIMITS)
    everybody = claude_code.load(lines, "t", 64, NO_LIMITS, sub_agents=True)

    assert [turn.prompt_tokens for turn in main[0].turns] == [640, 704]
    assert [turn.prompt_tokens for turn in everybody[0].turns] == [640, 320, 704]
    assert [list(turn.ids) for turn in main[0].turns] == [list(everybody[0].turns[place].ids) for place in (0, 2)]


runs = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=4)


@given(st.lists(runs, min_size=1, max_size=6), st.sampled_from([64, 128, 192]), st.integers(0, 5))
@example([[(0, 2), (5, 3)], [(0, 3), (5, 3)]], 64, 0)
@settings(max_examples=60, deadline=None)
def test_coding_ids_are_equal_exactly_where_all_blocks_before_are(
    prompts: list[list[tuple[int, int]]], page_tokens: int, shared: int
) -> None:
    def blocks(prompt: list[tuple[int, int]]) -> list[int]:
        return [block for start, length in prompt for block in range(start, start + length)]

    calls = [call(64 * len(blocks(prompt)) + 9, *prompt) for prompt in prompts]
    line = json.dumps(coding("a", *calls, tools=64 * shared))
    [session] = claude_code.load([line], "t", page_tokens, NO_LIMITS)

    for one, turn in zip(prompts, session.turns, strict=True):
        assert len(turn.ids) == turn.prompt_tokens // page_tokens
        for other, other_turn in zip(prompts, session.turns, strict=True):
            for pages in range(1, min(len(turn.ids), len(other_turn.ids)) + 1):
                end = pages * page_tokens // 64
                equal = blocks(one)[:end] == blocks(other)[:end]
                assert (turn.ids[pages - 1] == other_turn.ids[pages - 1]) == equal


# The others


def test_bailian_sessions_follow_parents_and_pages_name_all_before_them(tmp_path: Path) -> None:
    big = 2**63 + 5  # ids are hashes of 64 bits
    trace = load(
        write(
            tmp_path / "a.jsonl",
            chat(1, -1, 60.5, 130, big, 2, 3, 4, 5, 6, 7, 8, 9),
            chat(2, 1, 61.5, 128, big, 2, 3, 4, 1, 6, 7, 8),
            chat(3, 2, 62.0, 64, 5, 2, 3, 4),
            chat(4, 99, 63.0, 64, 1, 2, 3, 4),  # a parent that the file lacks
        )
    )
    assert [[turn.number for turn in session.turns] for session in trace.sessions] == [[0, 1, 2], [3]]
    assert [turn.at_s for turn in turns(trace)] == [0.0, 1.0, 1.5, 2.5]
    first, second, third, _ = turns(trace)
    assert (trace.page_tokens, len(first.ids), common(first, second), common(first, third)) == (64, 2, 1, 0)


def test_azure_rows_share_nothing(tmp_path: Path) -> None:
    trace = load(
        write(
            tmp_path / "a.csv",
            "TIMESTAMP,ContextTokens,GeneratedTokens",
            "2023-11-16 18:15:46.6805900,374,44",
            "2023-11-16 18:15:50.9951690,64,109",
        )
    )
    first, second = turns(trace)
    assert first.at_s == 0.0
    assert second.at_s == pytest.approx(4.314579, abs=1e-6)
    assert (len(first.ids), len(second.ids), len({*first.ids, *second.ids})) == (5, 1, 6)
    assert (first.output_tokens, second.prompt_tokens, len(trace.sessions)) == (44, 64, 2)


def test_burstgpt_leaves_failures_out_and_keeps_sessions(tmp_path: Path) -> None:
    header = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type"
    trace = load(
        write(
            tmp_path / "a.csv",
            header,
            "5,s1,0.4,ChatGPT,472,18,490,Conversation log",
            "45,s2,0.4,ChatGPT,100,0,100,Conversation log",
            '65.5,s1,0.4,"GPT-4, new",128,7,135,API log',
        )
    )
    assert [(session.id, len(session.turns)) for session in trace.sessions] == [("s1", 2)]
    assert [turn.at_s for turn in turns(trace)] == [0.0, 60.5]


def test_older_burstgpt_files_have_no_sessions(tmp_path: Path) -> None:
    header = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"
    row = "5,ChatGPT,472,18,490,Conversation log"
    assert len(load(write(tmp_path / "a.csv", header, row, row)).sessions) == 2


# Wrong files


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [request(0, 512, 0), {**request(0, 512, 0), "input_length": "many"}],
            "a.txt, line 2, input_length: wanted int, found str",
        ),
        ([request(0, 512, 0), "", request(0, 513, 0)], "a.txt, line 3, hash_ids: wanted 2 ids for 513 tokens, found 1"),
        (
            [request(0, 512, 0), {"timestamp": 0, "hash_ids": []}],
            "a.txt, line 2, input_length: wanted a value, found none",
        ),
        ([request(0, 512, 0), "{"], "a.txt, line 2, record: wanted a JSON object, found {"),
        ([coding("a", call(640, (1, 9)))], "a.txt, line 1, reqs[0]: wanted 10 blocks for 640 tokens, found 9"),
        ([{**coding("a"), "block_size": 16}], "a.txt, line 1, block_size: wanted 64, found 16"),
        ([coding("a", [0.0, 0, 0, 64, 7, [["x", 1]], 0])], "a.txt, line 1, reqs[0][5][0][0]: wanted int, found str"),
        ([chat(1, -1, 0, 64, 1)], "a.txt, line 1, hash_ids: wanted 4 ids for 64 tokens, found 1"),
        (
            ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46,12,many"],
            "a.txt, line 2, GeneratedTokens: wanted a whole number of tokens, found many",
        ),
        (
            ["TIMESTAMP,ContextTokens,GeneratedTokens", "yesterday,12,1"],
            "a.txt, line 2, TIMESTAMP: wanted a date and time, found yesterday",
        ),
        (["TIMESTAMP,ContextTokens,GeneratedTokens", "1,2"], "a.txt, line 2, row: wanted 3 values, found 2"),
        (
            ["name,age"],
            "a.txt, line 1, format: wanted one of mooncake, claude_code, bailian, burstgpt, azure, found name,age",
        ),
        (
            [],
            "a.txt, line 1, format: wanted one of mooncake, claude_code, bailian, burstgpt, azure, found an empty file",
        ),
    ],
)
def test_a_wrong_file_is_one_line_with_place_field_wanted_and_found(
    tmp_path: Path, lines: list[object], message: str
) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the whole message is compared)
        load(write(tmp_path / "a.txt", *lines))
    assert str(raised.value) == message


def test_a_format_that_is_named_is_believed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", chat(1, -1, 7.0, 64, 1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"line 1, hash_ids: wanted 1 ids for 64 tokens, found 4"):
        load(path, "mooncake")
    with pytest.raises(ValueError, match=r"line 1, header: wanted a column 'TIMESTAMP'"):
        load(path, "azure")
    with pytest.raises(ValueError, match="format: wanted one of mooncake"):
        load(path, "vtune")


@pytest.mark.parametrize("raw", [b"\x28\xb5\x2f\xfdgarbage", b"\xff\xfe\x00"])
def test_a_file_that_is_no_text_is_one_line_too(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"^a\.jsonl: wanted lines of text, plain or packed by zstd, found "):
        load(path)


def test_a_packed_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.zst", *(request(at, 600, at, 10_000 + at) for at in range(2000)))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"^a\.jsonl\.zst: wanted .*, found an end within a frame$"):
        load(path)


def test_a_file_packed_in_several_pieces_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    lines = (json.dumps(request(at, 600, at, 100 + at)).encode() + b"\n" for at in range(3))
    path.write_bytes(b"".join(zstandard.compress(line) for line in lines))
    assert load(path).requests == 3


# Arrivals and the LRU curve


def test_requests_of_one_moment_are_spread_until_the_next(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *(request(at, 600, at, 100 + at) for at in (0, 0, 0, 3000, 3000, 9000)))
    spread_trace = spread(load(path))

    assert [at_s for at_s, _, _ in spread_trace.arrivals()] == [0.0, 1.0, 2.0, 3.0, 6.0, 9.0]
    assert [turn.number for _, _, turn in spread_trace.arrivals()] == list(range(6))


def test_arrivals_of_one_moment_keep_the_order_of_the_file(tmp_path: Path) -> None:
    # Sessions [0, 3] and [1, 2], all at the same time.
    path = write(
        tmp_path / "a.jsonl",
        request(0, 1024, 1, 2),
        request(0, 1024, 3, 4),
        request(0, 1536, 3, 4, 5),
        request(0, 1536, 1, 2, 6),
    )
    assert [turn.number for _, _, turn in load(path).arrivals()] == [0, 1, 2, 3]


def turn(number: int, tokens: int, *ids: int, partial_id: int | None = None) -> Turn:
    return Turn(
        number=number, prompt_tokens=tokens, output_tokens=1, ids=ids, partial_id=partial_id, at_s=float(number)
    )


def test_the_pool_drops_the_oldest_leaf_first() -> None:
    # Room for 3 pages of 10 tokens.
    asked = [
        turn(0, 30, 1, 2, 3),
        turn(1, 20, 1, 4),  # 3 goes: 1 2 4
        turn(2, 30, 1, 2, 3),  # hits 1 2; 4 goes
        turn(3, 20, 1, 4),  # hits 1; 3 goes, 2 stays
        turn(4, 20, 1, 2),  # hits 1 2
    ]
    by_tokens, by_pages = lru.hit_rates(asked, 10, 30, partial=False)
    assert by_tokens == by_pages == pytest.approx((0 + 1 + 2 + 1 + 2) / 12)


def test_a_partial_page_counts_for_the_tokens_it_has() -> None:
    asked = [turn(0, 15, 1, partial_id=2), turn(1, 15, 1, partial_id=2)]
    assert lru.hit_rates(asked, 10, None, partial=False) == (10 / 30, 1 / 2)
    assert lru.hit_rates(asked, 10, None, partial=True) == (15 / 30, 2 / 4)


def test_the_curve_is_measured_for_every_size_and_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *(request(at, 1024, at % 3, 10 + at % 3) for at in range(30)))
    result = lru.measure(load(path), [1024, 2048])

    rates = [point["whole_pages"] for point in result["curve"]]
    assert [point["capacity_tokens"] for point in result["curve"]] == [1024, 2048, None]
    assert rates == [0.0, 0.0, 0.9]  # three prompts in turn never fit into less
    assert all(point["published"] is None for point in result["curve"])


@pytest.mark.skipif("MAINSTEM_TRACES" not in os.environ, reason="MAINSTEM_TRACES names no folder with published traces")
def test_the_published_conversation_trace_has_its_published_rates() -> None:
    [path] = Path(os.environ["MAINSTEM_TRACES"]).glob("*conversation_trace.jsonl*")
    trace = load(path)
    result = lru.measure(trace, [1_000_000, 3_000_000, 10_000_000, 50_000_000])

    assert (trace.requests, len(trace.sessions), trace.synthetic) == (12_031, 8_056, False)
    *curve, unbounded = result["curve"]
    assert unbounded["with_partial_page_by_pages"] == pytest.approx(0.3664, abs=5e-5)
    for point in curve:
        assert point["with_partial_page"] == pytest.approx(point["published"], abs=0.001)
        assert point["whole_pages"] == pytest.approx(point["published"], abs=0.01)


@pytest.mark.skipif("MAINSTEM_TRACES" not in os.environ, reason="MAINSTEM_TRACES names no folder with published traces")
def test_the_published_coding_sessions_load() -> None:
    [path] = Path(os.environ["MAINSTEM_TRACES"]).glob("claude_code_sessions.jsonl*")
    trace = load(path)

    assert (len(trace.sessions), trace.closed) == (300, True)
    assert max(turn.prompt_tokens for session in trace.sessions for turn in session.turns) <= 128_000
    assert all(isinstance(session, Session) and session.turns for session in trace.sessions)
