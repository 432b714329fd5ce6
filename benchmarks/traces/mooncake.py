"""Mooncake's traces (conversation, toolagent, synthetic): open loop, 512-token blocks, no sessions.

    {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [...]}

`hash_ids` has one id for every block of the prompt, the partial last one included.

Sessions are derived: a request continues the latest one whose whole blocks it begins with. One
block is no evidence: in the conversation trace all requests begin with the same system prompt,
of one block.

Timestamps come in steps of 3 s and are kept; `benchmarks.traces.arrivals` spreads them.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from benchmarks.traces.blocks import Blocks
from benchmarks.traces.limits import Limits
from benchmarks.traces.lines import decoded, numbered, wrong
from benchmarks.traces.trace import Session, Turn

BLOCK_TOKENS = 512
PAGE_TOKENS = 512
EVIDENCE_BLOCKS = 2
"""Whole blocks that two requests share if they are of one session."""


class Record(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def recognises(first: str) -> bool:
    """Whether a file's first line looks like this format."""
    return first.startswith("{") and '"hash_ids"' in first and '"timestamp"' in first and '"chat_id"' not in first


def load(lines: Sequence[str], source: str, page_tokens: int, limits: Limits) -> list[Session]:
    """Sessions in order of their first request. Raises ValueError."""
    decoder = msgspec.json.Decoder(Record)
    blocks = Blocks(source, BLOCK_TOKENS, page_tokens)
    sessions: dict[int, list[Turn]] = {}
    ends: dict[int, tuple[int, int]] = {}
    """(place, session) of the latest request by its last whole block, which names all blocks before it."""
    for place, (line, text) in enumerate(numbered(lines)):
        record = decoded(decoder, source, line, text)
        wanted = -(-record.input_length // BLOCK_TOKENS)
        if len(record.hash_ids) != wanted:
            raise wrong(
                source,
                line,
                "hash_ids",
                f"{wanted} ids for {record.input_length} tokens",
                len(record.hash_ids),
            )
        if not limits.allows(record.input_length):
            continue
        session = _session(record, ends)
        if session is None:
            session = place
            sessions[session] = []
        whole = record.input_length // BLOCK_TOKENS
        if whole >= EVIDENCE_BLOCKS:
            ends[record.hash_ids[whole - 1]] = place, session
        ids, partial_id = blocks.ids(record.hash_ids, record.input_length)
        turn = Turn(
            number=place,
            at_s=record.timestamp / 1000,
            prompt_tokens=record.input_length,
            output_tokens=record.output_length,
            ids=ids,
            partial_id=partial_id,
        )
        sessions[session].append(turn)
    return limits.first(Session(str(number), turns) for number, turns in sessions.items())


def _session(record: Record, ends: dict[int, tuple[int, int]]) -> int | None:
    """The session that it continues, if any."""
    continued = [ends[block] for block in record.hash_ids[EVIDENCE_BLOCKS - 1 :] if block in ends]
    return max(continued)[1] if continued else None
