"""Qwen-Bailian's usage traces: open loop, 16-token blocks, sessions by their parents.

    {"chat_id", "parent_chat_id": -1 or a chat_id, "timestamp": s, "input_length", "output_length",
     "type", "turn", "hash_ids": [...]}

A block's id is a hash of its content alone, so equal ids under different beginnings are different
pages here. Whether a partial last block has an id is not said: both are read.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from benchmarks.traces.blocks import Blocks
from benchmarks.traces.limits import Limits
from benchmarks.traces.lines import decoded, numbered, wrong
from benchmarks.traces.trace import Session, Turn

BLOCK_TOKENS = 16
PAGE_TOKENS = 64
ROOT = -1


class Record(msgspec.Struct):
    chat_id: int
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]
    parent_chat_id: int = ROOT


def recognises(first: str) -> bool:
    """Whether a file's first line looks like this format."""
    return first.startswith("{") and '"chat_id"' in first and '"hash_ids"' in first


def load(lines: Sequence[str], source: str, page_tokens: int, limits: Limits) -> list[Session]:
    """Sessions in order of their first request. A parent that the file lacks begins a session. Raises ValueError."""
    decoder = msgspec.json.Decoder(Record)
    blocks = Blocks(source, BLOCK_TOKENS, page_tokens)
    sessions: dict[int, list[Turn]] = {}
    session_of: dict[int, int] = {}
    start_s: float | None = None
    for place, (line, text) in enumerate(numbered(lines)):
        record = decoded(decoder, source, line, text)
        whole = record.input_length // BLOCK_TOKENS
        if len(record.hash_ids) not in (whole, -(-record.input_length // BLOCK_TOKENS)):
            raise wrong(source, line, "hash_ids", f"{whole} ids for {record.input_length} tokens", len(record.hash_ids))
        session = session_of.setdefault(record.chat_id, session_of.get(record.parent_chat_id, record.chat_id))
        if not limits.allows(record.input_length):
            continue
        if start_s is None:
            start_s = record.timestamp
        ids, partial_id = blocks.ids(record.hash_ids, record.input_length)
        turn = Turn(
            number=place,
            at_s=record.timestamp - start_s,
            prompt_tokens=record.input_length,
            output_tokens=record.output_length,
            ids=ids,
            partial_id=partial_id,
        )
        sessions.setdefault(session, []).append(turn)
    return limits.first(Session(str(number), turns) for number, turns in sessions.items())
