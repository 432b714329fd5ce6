"""Coding sessions of an agent: closed loop, 64-token blocks, ids local to a session.

    {"id", "models", "block_size": 64, "tool_tokens", "system_tokens",
     "reqs": [[t_s, api_time_s, think_time_s, in_tokens, out_tokens, [[start, length], ...], agent], ...]}

[start, length] is a run of block ids; only whole blocks have one. Agent 0 is the main one, others have
names. The calls of sub-agents, where they are wanted, are made in the file's order, one after the other:
a simplification.

Sharing between sessions is a rule too: sessions with equal (tool_tokens, system_tokens) have the same
tool definitions and system prompt, so the first (tool_tokens + system_tokens) // 64 blocks are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from benchmarks.traces.blocks import Blocks
from benchmarks.traces.limits import Limits
from benchmarks.traces.lines import decoded, numbered, wrong
from benchmarks.traces.trace import Session, Turn

BLOCK_TOKENS = 64
PAGE_TOKENS = 512
LIMITS = Limits(sessions=300, prompt_tokens=128_000, think_s=60.0)
"""As in the results that ours are compared with; the longest pauses are somebody's lunch."""
MAIN_AGENT = 0

Runs = list[tuple[int, int]]


class Call(msgspec.Struct, array_like=True):
    at_s: float
    api_time_s: float | None
    think_s: float | None
    prompt_tokens: int
    output_tokens: int
    runs: Runs
    agent: int | str


class Record(msgspec.Struct):
    id: str
    block_size: int
    tool_tokens: int
    system_tokens: int
    reqs: list[Call]


def recognises(first: str) -> bool:
    """Whether a file's first line looks like this format."""
    return first.startswith("{") and '"block_size"' in first and '"reqs"' in first


def load(
    lines: Sequence[str], source: str, page_tokens: int, limits: Limits, *, sub_agents: bool = False
) -> list[Session]:
    """Sessions in the file's order. Raises ValueError."""
    return limits.first(_sessions(lines, source, page_tokens, limits, sub_agents))


def _sessions(
    lines: Sequence[str], source: str, page_tokens: int, limits: Limits, sub_agents: bool
) -> Iterator[Session]:
    decoder = msgspec.json.Decoder(Record)
    blocks = Blocks(source, BLOCK_TOKENS, page_tokens)
    numbers = _Numbers()
    made = 0
    for line, text in numbered(lines):
        record = decoded(decoder, source, line, text)
        if record.block_size != BLOCK_TOKENS:
            raise wrong(source, line, "block_size", BLOCK_TOKENS, record.block_size)
        numbers.next_session(record)
        turns: list[Turn] = []
        last: Runs = []
        for place, call in enumerate(record.reqs):
            _check(call, source, line, place)
            if (call.agent != MAIN_AGENT and not sub_agents) or not limits.allows(call.prompt_tokens):
                continue
            # Most calls repeat the one before and add to it: only what is new is expanded and hashed.
            known = turns[-1].ids[: _common_blocks(last, call.runs) // blocks.blocks_per_page] if turns else []
            ids, partial_id = blocks.numbered_ids(numbers.of(call.runs), call.prompt_tokens, known)
            turn = Turn(
                number=made + len(turns),
                think_s=limits.think(call.think_s or 0.0) if turns else 0.0,
                prompt_tokens=call.prompt_tokens,
                output_tokens=call.output_tokens,
                ids=ids,
                partial_id=partial_id,
            )
            turns.append(turn)
            last = call.runs
        made += len(turns)
        yield Session(record.id, turns)


def _check(call: Call, source: str, line: int, place: int) -> None:
    found, wanted = sum(length for _, length in call.runs), call.prompt_tokens // BLOCK_TOKENS
    if found != wanted:
        raise wrong(source, line, f"reqs[{place}]", f"{wanted} blocks for {call.prompt_tokens} tokens", found)
    if any(start < 0 or length < 0 for start, length in call.runs):
        raise wrong(source, line, f"reqs[{place}]", "runs of block ids from 0 on", call.runs)


def _common_blocks(one: Runs, other: Runs) -> int:
    """Leading blocks of both. Fewer than there are where equal blocks are cut into other runs."""
    common = 0
    for (start, length), (other_start, other_length) in zip(one, other, strict=False):
        if start != other_start:
            break
        common += min(length, other_length)
        if length != other_length:
            break
    return common


class _Numbers:
    """One number for one block of the whole trace, where ids are known in a session only."""

    def __init__(self) -> None:
        self._free = 0
        self._shared: dict[tuple[int, int], int] = {}
        self._base = 0
        self._shared_base = 0
        self._shared_runs: list[int] = []

    def next_session(self, record: Record) -> None:
        self._base = self._free
        self._free += 1 + max((start + length for call in record.reqs for start, length in call.runs), default=0)
        shared = (record.tool_tokens + record.system_tokens) // BLOCK_TOKENS
        kind = (record.tool_tokens, record.system_tokens)
        if kind not in self._shared:
            self._shared[kind] = self._free
            self._free += shared
        self._shared_base = self._shared[kind]
        main = next((call for call in record.reqs if call.agent == MAIN_AGENT), None)
        self._shared_runs = _expanded(main.runs, shared) if main is not None else []

    def of(self, runs: Runs) -> list[int]:
        """Those that the main agent's first call begins with are shared; another call shares as far as it agrees."""
        base = self._base
        numbers = [number for start, length in runs for number in range(base + start, base + start + length)]
        for place, local in enumerate(self._shared_runs):
            if place >= len(numbers) or numbers[place] != base + local:
                break
            numbers[place] = self._shared_base + place
        return numbers


def _expanded(runs: Runs, most: int) -> list[int]:
    expanded: list[int] = []
    for start, length in runs:
        expanded += range(start, start + min(length, most - len(expanded)))
    return expanded
