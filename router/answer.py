"""What the router has to know of an answer that passes through it: did it fail, did it end, what did it use."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


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
                seen.failure = Failure(500, "the worker aborted the request")
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
