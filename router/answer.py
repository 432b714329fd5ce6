"""Read from an answer that passes through what the router has to know: did it fail, did it end, what did it use.

The bytes themselves are never changed. A stream is looked at line by line, and a line
is parsed only where a cheap search says that there may be something in it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_ERROR = re.compile(rb'"error"\s*:')
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"(\w+)"')
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_TOKEN = re.compile(rb'"(?:content|text|reasoning_content|arguments)"\s*:\s*"[^"]')
_MAX_LINE_BYTES = 16 * 1024 * 1024
"""A line longer than this is not looked at."""


@dataclass(slots=True)
class Usage:
    """The engine's own count."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """0 also where the engine left it out, which it does at 0."""


@dataclass(slots=True)
class Failure:
    """An error that the engine reported inside an answer."""

    status: int
    message: str
    told: bool = True
    """Whether it stands in the answer as an error, so that a client sees it as one."""


@dataclass(slots=True)
class Seen:
    """What was found so far."""

    usage: Usage | None = None
    finish_reason: str | None = None
    failure: Failure | None = None
    token_events: int = 0
    """Events that carried text; about one a token."""

    @property
    def empty(self) -> bool:
        """No token came and nothing says that none should."""
        return (
            not self.token_events and self.finish_reason is None and not (self.usage and self.usage.completion_tokens)
        )


class StreamWatch:
    """Looks at server-sent events as they pass, in whatever pieces they come."""

    def __init__(self) -> None:
        self.seen = Seen()
        self._rest = b""

    def feed(self, piece: bytes) -> None:
        """The next bytes of the stream."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            self._line(line)
        if len(self._rest) > _MAX_LINE_BYTES:
            self._rest = b""

    def end(self) -> Seen:
        """The stream is over."""
        self._line(self._rest)
        self._rest = b""
        return self.seen

    def _line(self, line: bytes) -> None:
        if not line.startswith(b"data:"):
            return
        if _TOKEN.search(line):
            self.seen.token_events += 1
        finish = _FINISH.search(line)
        if finish is not None:
            self.seen.finish_reason = finish[1].decode()
            if self.seen.finish_reason == "abort":
                self.seen.failure = self.seen.failure or Failure(500, "the worker aborted the request", told=False)
        if _ERROR.search(line):
            self.seen.failure = failure_in(_parsed(line[5:])) or self.seen.failure
        if _USAGE.search(line):
            self.seen.usage = usage_in(_parsed(line[5:])) or self.seen.usage


def whole(raw: bytes) -> Seen:
    """Looks at an answer that came in one piece."""
    body = _parsed(raw)
    seen = Seen(usage=usage_in(body), failure=failure_in(body))
    choices = body.get("choices") if isinstance(body, dict) else None
    for choice in choices if isinstance(choices, list) else []:
        reason = choice.get("finish_reason") if isinstance(choice, dict) else None
        if isinstance(reason, str):
            seen.finish_reason = reason
            if reason == "abort":
                seen.failure = Failure(500, "the worker aborted the request", told=False)
    return seen


def failure_in(body: Any) -> Failure | None:
    """The error in a parsed answer, in OpenAI's shape or in the engine's flat one."""
    if not isinstance(body, dict):
        return None
    error = body.get("error")
    if error is None and body.get("object") == "error":
        error = body
    if error is None:
        return None
    if not isinstance(error, dict):
        return Failure(500, str(error))
    code = error.get("code")
    return Failure(code if type(code) is int and 400 <= code < 600 else 500, str(error.get("message") or "no message"))


def usage_in(body: Any) -> Usage | None:
    """The usage in a parsed answer."""
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    return Usage(_number(usage.get("prompt_tokens")), _number(usage.get("completion_tokens")), _number(cached))


def _number(value: Any) -> int:
    return value if type(value) is int else 0


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return None
