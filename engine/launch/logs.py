"""The end of a log file, and which of its lines says why a process died."""

from __future__ import annotations

import os
import re
from pathlib import Path

_TAIL_BYTES = 32_768
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_SAYS_WHY = re.compile(
    r"^\s*(?:[\w.]+(?:Error|Exception|Exit)\b|error:|.*\berror: |.*out of memory|.*Killed)", re.IGNORECASE
)


def last_lines(path: Path, count: int) -> list[str]:
    """The last `count` lines that are not blank, without colours; empty where there is no file yet."""
    try:
        with path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            log.seek(max(0, log.tell() - _TAIL_BYTES))
            text = log.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines = (_COLOUR.sub("", line).rstrip() for line in re.split(r"[\r\n]+", text))
    return [line for line in lines if line.strip()][-count:]


def telling_line(path: Path) -> str:
    """The last line that looks like an error, else the last line; empty where there is none."""
    lines = last_lines(path, 40)
    why = next((line for line in reversed(lines) if _SAYS_WHY.match(line)), None)
    return (why or (lines[-1] if lines else "")).strip()
