"""A trace file's lines, packed by zstd or plain, and what is said of a line that is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import zstandard

Record = TypeVar("Record")

_MAGIC = b"\x28\xb5\x2f\xfd"
_WINDOW_BYTES = 1 << 31
"""The largest there is: files packed with a long window open without an option."""
_EXPECTED = re.compile(r"Expected `([^`]*)`(.*), got `([^`]*)`(?: - at `\$\.?(.*)`)?$")
_MISSING = re.compile(r"Object missing required field `([^`]*)`(?: - at `\$\.?(.*)`)?$")


def read_lines(path: Path) -> list[str]:
    """All lines, without their ends. Raises OSError, and ValueError for a file that is not what it seems."""
    raw = path.read_bytes()
    try:
        return (_unpacked(raw) if raw.startswith(_MAGIC) else raw).decode("utf-8-sig").splitlines()
    except (zstandard.ZstdError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: wanted lines of text, plain or packed by zstd, found {error}") from error


def _unpacked(raw: bytes) -> bytes:
    """All frames, one after the other. A file that was cut short is an error, not a shorter trace."""
    frames = []
    while raw:
        unpacker = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES).decompressobj()
        frames.append(unpacker.decompress(raw))
        if not unpacker.eof:
            raise zstandard.ZstdError("an end within a frame")
        raw = unpacker.unused_data
    return b"".join(frames)


def numbered(lines: Sequence[str], first: int = 1) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, with their numbers as an editor shows them."""
    return ((number, line) for number, line in enumerate(lines, start=first) if line.strip())


def wrong(source: str, line: int, field: str, wanted: object, found: object) -> ValueError:
    """What every loader raises."""
    return ValueError(f"{source}, line {line}, {field}: wanted {wanted}, found {found}")


def decoded(decoder: msgspec.json.Decoder[Record], source: str, line: int, text: str) -> Record:
    """One JSON line. Raises ValueError as `wrong` does."""
    try:
        return decoder.decode(text)
    except msgspec.ValidationError as error:
        if match := _EXPECTED.match(str(error)):
            wanted, more, found, field = match.groups()
            raise wrong(source, line, field or "record", wanted + more, found) from error
        if match := _MISSING.match(str(error)):
            field, place = match.groups()
            raise wrong(source, line, f"{place}.{field}" if place else field, "a value", "none") from error
        raise wrong(source, line, "record", "this format", str(error)) from error
    except msgspec.DecodeError as error:
        raise wrong(source, line, "record", "a JSON object", f"{text:.40}") from error
