"""Server-sent events of OpenAI's streams: their data, read and written."""

from __future__ import annotations

import json
from typing import Any

END = b"\n\n"
"""Behind each event."""


def data(event: bytes) -> Any:
    """The parsed data of an event; None where it is none."""
    lines = [line[5:] for line in event.split(b"\n") if line.startswith(b"data:")]
    try:
        return json.loads(b"\n".join(lines))
    except ValueError:
        return None


def encoded(body: Any) -> bytes:
    """An event without its end, as SGLang writes it."""
    return b"data: " + json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()


def text_of(body: Any) -> str:
    """What an event adds to an answer's text; "" where it is no event of an answer."""
    return "".join(text for text, _ in _texts(body))


def without(body: Any, text: str) -> str:
    """Takes the beginning of an event's text away, in place, as far as it is that of `text`. What is left of `text`."""
    for own, holder in _texts(body):
        shared = len(own) if text.startswith(own) else len(text) if own.startswith(text) else 0
        holder["content" if "content" in holder else "text"] = own[shared:]
        text = text[shared:]
    return text


def _texts(body: Any) -> list[tuple[str, dict[str, Any]]]:
    """Each choice's text, and the object in which it stands."""
    choices = body.get("choices") if isinstance(body, dict) else None
    found = []
    for choice in choices if isinstance(choices, list) else []:
        holder = choice.get("delta", choice) if isinstance(choice, dict) else None
        if not isinstance(holder, dict):
            continue
        text = holder.get("content", holder.get("text"))
        if isinstance(text, str):
            found.append((text, holder))
    return found
