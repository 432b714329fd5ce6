"""Tables of arrivals and lengths: no prefixes, so every page of every request is its own."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import msgspec

from benchmarks.traces.blocks import Blocks
from benchmarks.traces.limits import Limits
from benchmarks.traces.lines import numbered, wrong
from benchmarks.traces.trace import Session, Turn

Value = TypeVar("Value")


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """One row, whatever its columns are called."""

    time_s: float
    prompt_tokens: int
    output_tokens: int
    session: str = ""


class Row:
    """Values by column, with the place for what is said of a wrong one."""

    def __init__(self, source: str, line: int, values: dict[str, str]) -> None:
        self._source = source
        self._line = line
        self._values = values

    def __contains__(self, column: str) -> bool:
        return bool(self._values.get(column))

    def text(self, column: str) -> str:
        return self._values.get(column, "")

    def parsed(self, column: str, parse: Callable[[str], Value], wanted: str) -> Value:
        """Raises ValueError where `parse` does."""
        try:
            return parse(self._values[column])
        except ValueError as error:
            raise wrong(self._source, self._line, column, wanted, self._values[column] or "nothing") from error

    def tokens(self, column: str) -> int:
        return self.parsed(column, _tokens, "a whole number of tokens")


def read_rows(lines: Sequence[str], source: str, columns: Sequence[str]) -> Iterator[Row]:
    """All rows. Raises ValueError where the header lacks one of `columns`, or a row a value."""
    rows = numbered(lines)
    line, first = next(rows, (1, ""))
    header = next(csv.reader([first]), [])
    for column in columns:
        if column not in header:
            raise wrong(source, line, "header", f"a column {column!r}", first or "nothing")
    for line, text in rows:
        values = next(csv.reader([text]))
        if len(values) != len(header):
            raise wrong(source, line, "row", f"{len(header)} values", len(values))
        yield Row(source, line, dict(zip(header, values, strict=True)))


def unshared(arrivals: Iterable[Arrival], source: str, page_tokens: int, limits: Limits) -> list[Session]:
    """Sessions by name, each nameless request its own, in order of their first request."""
    blocks = Blocks(source, page_tokens, page_tokens)
    sessions: dict[str, list[Turn]] = {}
    start_s: float | None = None
    used = 0
    for place, arrival in enumerate(arrivals):
        if start_s is None:
            start_s = arrival.time_s
        if not limits.allows(arrival.prompt_tokens):
            continue
        pages = -(-arrival.prompt_tokens // page_tokens)
        ids, partial_id = blocks.numbered_ids(range(used, used + pages), arrival.prompt_tokens)
        used += pages
        turn = Turn(
            number=place,
            at_s=arrival.time_s - start_s,
            prompt_tokens=arrival.prompt_tokens,
            output_tokens=arrival.output_tokens,
            ids=ids,
            partial_id=partial_id,
        )
        sessions.setdefault(arrival.session or f"request {place}", []).append(turn)
    return limits.first(Session(name, turns) for name, turns in sessions.items())


def _tokens(text: str) -> int:
    tokens = int(text)
    if tokens < 0:
        raise ValueError(text)
    return tokens
