"""The first token of a stream, as prefill says it: computed, and not yet handed over.

    prefill leg ── opening, first token ──────────────────────> client
    decode leg ─── opening, first token, … ─> TokenStream.told ─> client, without what it has

Prefill answers as a stream, of which nothing but this passes. It passes where the tokens of its text are known and the
prompt that it was computed from has as many tokens as the one that was sent; else the client waits for decode's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.events import END, data, encoded, text_of
from router.messages import Json
from router.token_stream import TokenStream
from router.truth import untrue

STREAM_OPTIONS = {"include_usage": True, "continuous_usage_stats": True}
"""What prefill is asked for: a first event says how long the prompt was, the last one what the cache had of it."""


@dataclass(frozen=True)
class Said:
    """The beginning of an answer.

    events         for the client
    token          whose text they have
    cached_tokens  of the prompt; None where nothing is said of them, as where there are none
    """

    events: bytes
    token: int
    text: str
    cached_tokens: int | None


class FirstToken:
    """Prefill's answer to one request."""

    def __init__(self, prompt: Sequence[int], wants_usage: bool) -> None:
        """wants_usage  whether the client has asked for the usage in each event"""
        self.stream = TokenStream()
        """What it says of itself."""
        self._prompt = prompt
        self._wants_usage = wants_usage
        self._over = False
        """Whether the first text has come."""

    def feed(self, piece: bytes) -> Said | None:
        """The next bytes of the answer. What the client may be told of them: once, or never."""
        said = None
        for passing in self.stream.each(piece):
            if not self._over:
                self._over = True
                said = self._said(passing)
        return said

    def _said(self, passing: bytes) -> Said | None:
        stream = self.stream
        usage = stream.seen.usage
        known = stream.exact and len(stream.ids) == 1 and not stream.reasoned and stream.seen.finish_reason is None
        if not known or usage is None or untrue(usage, self._prompt):
            return None
        events = passing.split(END)[:-1]
        text = "".join(text_of(data(event)) for event in events)
        if not text:
            return None
        if not self._wants_usage:
            events = [_without_usage(event) for event in events]
        return Said(b"".join(event + END for event in events), stream.ids[0], text, usage.cached_tokens or None)


def wants_usage(body: Json) -> bool:
    """Whether this request's client has asked for the usage in each event."""
    options = body.get("stream_options")
    return isinstance(options, dict) and bool(options.get("continuous_usage_stats"))


def _without_usage(event: bytes) -> bytes:
    if b'"usage"' not in event:
        return event
    body = data(event)
    if not isinstance(body, dict):
        return event
    del body["usage"]
    # As SGLang's own events without it: it leaves it out of a chat's.
    return encoded(body if body.get("object") == "chat.completion.chunk" else {**body, "usage": None})
