"""Any trace file as a Trace: the format is recognised by the first line, or named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.traces import azure, bailian, burstgpt, claude_code, mooncake
from benchmarks.traces.limits import NO_LIMITS, Limits
from benchmarks.traces.lines import read_lines, wrong
from benchmarks.traces.trace import Session, Trace


class Format(NamedTuple):
    recognises: Callable[[str], bool]
    load: Callable[[Sequence[str], str, int, Limits], list[Session]]
    page_tokens: int
    """Where the caller names none."""
    limits: Limits
    """Where the caller names none."""


FORMATS = {
    "mooncake": Format(mooncake.recognises, mooncake.load, mooncake.PAGE_TOKENS, NO_LIMITS),
    "claude_code": Format(claude_code.recognises, claude_code.load, claude_code.PAGE_TOKENS, claude_code.LIMITS),
    "bailian": Format(bailian.recognises, bailian.load, bailian.PAGE_TOKENS, NO_LIMITS),
    "burstgpt": Format(burstgpt.recognises, burstgpt.load, burstgpt.PAGE_TOKENS, NO_LIMITS),
    "azure": Format(azure.recognises, azure.load, azure.PAGE_TOKENS, NO_LIMITS),
}


def load(
    path: Path, format_name: str | None = None, page_tokens: int | None = None, limits: Limits | None = None
) -> Trace:
    """The trace in a file, packed by zstd or plain.

    format_name  one of FORMATS; None looks at the first line
    page_tokens  a multiple of the format's blocks; None is the format's own choice
    limits       None is the format's own choice

    Its name is the file's without endings, and it counts as synthetic if that says so.
    Raises OSError, and ValueError with file, line, field, what was wanted and what was found.
    """
    lines = read_lines(path)
    if format_name is not None and format_name not in FORMATS:
        raise ValueError(f"format: wanted one of {', '.join(FORMATS)}, found {format_name}")
    kind = FORMATS[format_name or _recognised(lines, path.name)]
    sessions = kind.load(
        lines,
        path.name,
        kind.page_tokens if page_tokens is None else page_tokens,
        kind.limits if limits is None else limits,
    )
    if not sessions:
        raise ValueError(f"{path.name}: wanted requests within the limits, found none")
    name = path.name.partition(".")[0]
    return Trace(
        name=name,
        synthetic="synthetic" in name.lower(),
        page_tokens=kind.page_tokens if page_tokens is None else page_tokens,
        sessions=sessions,
    )


def _recognised(lines: Sequence[str], source: str) -> str:
    first = next((line for line in lines if line.strip()), "")
    for name, kind in FORMATS.items():
        if kind.recognises(first):
            return name
    raise wrong(source, 1, "format", f"one of {', '.join(FORMATS)}", f"{first:.60}" if first else "an empty file")
