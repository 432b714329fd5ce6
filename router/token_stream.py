"""A stream of server-sent events on its way to a client: what may pass, how far its tokens are known, how it ended.

    feed(bytes of the worker) ──> bytes for the client

A worker of ours marks the events of its text (`engine.token_marks`). An event passes when the tokens of all text up to
it are known, so that the stream can be taken up elsewhere from exactly there; one that is marked as having more to
come waits for the next, unless it says nothing, as the first part of a character does. The marks themselves do not
pass. An event without a mark passes at once, but for those before the first token: they wait for it, so that until then
nothing is said that could not be taken back.

An error within the stream does not pass: it is in `seen`.

The stream of another worker may continue it. Its opening is dropped, and its id and its sums become those of the
whole (`Continuation`). Where the client has the first token already, from prefill (`told`), it is left out. Every
other byte is as the worker wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from router.answer import Failure, Seen, failure_in, usage_in
from router.events import END, data, encoded, without

_MARK = b"mainstem: "
_MORE = b"+"
_ERROR = re.compile(rb'"error"\s*:')
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"(\w+)"')
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_TEXT = re.compile(rb'"(?:content|text|reasoning_content|arguments)"\s*:\s*"[^"]')
_REASONING = re.compile(rb'"reasoning_content"\s*:\s*"[^"]')
_DONE = re.compile(rb"^data:\s*\[DONE\]")
MAX_EVENT_BYTES = 16 * 1024 * 1024
"""A longer event is not looked at, and passes in pieces."""


@dataclass(frozen=True)
class Continuation:
    """What a stream that goes on elsewhere has to say as the first one would have."""

    id: bytes
    """Of the whole stream, as the client has read it."""
    own_id: bytes
    """Of the part; as long as the whole one's."""
    generated_tokens: int
    """Before this part. Its worker takes them for a part of the prompt."""


class TokenStream:
    """One worker's part of a stream."""

    def __init__(self, continues: Continuation | None = None) -> None:
        self.seen = Seen()
        self.ids: list[int] = []
        """Tokens of all text that has passed, where `exact`."""
        self.exact = True
        """Whether text has passed only with its tokens."""
        self.begun = False
        """Whether anything has passed."""
        self.done = False
        """Whether the worker said that this was all."""
        self.reasoned = False
        """Whether a part of the text was told apart as reasoning: that depends on all text before."""
        self._continues = continues
        self._told: tuple[int, str] | None = None
        """A token that the client has of this part, and its text, until it has come."""
        self._rest = b""
        self._held: list[bytes] = []

    @property
    def said_all(self) -> bool:
        """Whether the worker said why it ended, and that was well."""
        return self.seen.finish_reason is not None and self.seen.failure is None

    def told(self, token: int, text: str) -> None:
        """The client has an opening, and the first token, before anything has passed."""
        self._told = token, text

    def feed(self, piece: bytes) -> bytes:
        """The next bytes of the worker. Returns what the client gets now."""
        return b"".join(self.each(piece))

    def each(self, piece: bytes) -> Iterator[bytes]:
        """`feed`, event by event: what is known of the stream is what was known when each passed. To be read to its
        end."""
        if b"\r" in piece:
            piece = piece.replace(b"\r\n", b"\n")
        *events, self._rest = (self._rest + piece).split(END)
        for event in events:
            if out := self._event(event):
                yield out
        if len(self._rest) > MAX_EVENT_BYTES:
            self.exact = False
            rest, self._rest = self._rest, b""
            yield self._release(rest)

    def end(self) -> bytes:
        """The stream is over. Returns what is left for the client."""
        rest, self._rest = self._rest, b""
        passing = self._event(rest.removesuffix(b"\n")) if rest.strip() else b""
        return passing + (self._release(b"") if self.seen.finish_reason is not None else b"")

    def _event(self, event: bytes) -> bytes:
        mark = None
        if event.startswith(_MARK):
            mark, _, event = event[len(_MARK) :].partition(b"\n")
        self._look(event)
        if mark is not None and mark != _MORE:
            try:
                self.ids += map(int, mark.split(b","))
            except ValueError:
                self.exact = False
        if self.seen.failure is not None:
            # What the client is told of it, if it is told, depends on what can be done about it.
            return b""
        whole = self._rewritten(event) + END
        if self._waits(mark, event):
            self._held.append(whole)
            return b""
        if mark is None and _TEXT.search(event):
            self.exact = False
        return self._release(whole)

    def _waits(self, mark: bytes | None, event: bytes) -> bool:
        """Whether this event goes with the next one."""
        if mark == _MORE:
            return not self.begun or bool(self._held) or self._tells(event)
        return mark is None and not self.begun and not self._tells(event)

    def _tells(self, event: bytes) -> bool:
        """Whether this event is more than the opening of a stream."""
        return bool(_TEXT.search(event) or _FINISH.search(event) or _USAGE.search(event) or _DONE.match(event))

    def _release(self, event: bytes) -> bytes:
        held, self._held = self._held, []
        if (self._continues is not None or self._told is not None) and not self.begun and held:
            # The client has read an opening already.
            held = [one for one in held if _TEXT.search(one)]
        self.begun = True
        return self._without_told([*held, event]) if self._told is not None else b"".join(held) + event

    def _without_told(self, events: list[bytes]) -> bytes:
        """The first that pass, without what the client has of them."""
        assert self._told is not None, "asked only then"
        (token, text), self._told = self._told, None
        passing = []
        for event in events:
            body = data(event) if text and _TEXT.search(event) else None
            if body is None:
                passing.append(event)
                continue
            text = without(body, text)
            whole = encoded(body) + END
            if any(one.search(whole) for one in (_TEXT, _FINISH, _USAGE)):
                passing.append(whole)
        if text or (self.ids and self.ids[0] != token):
            # It was handed over with the pages: whatever this goes on from, it is not what the client has.
            self.seen.failure = self.seen.failure or Failure(500, "began with another token than prefill has said")
            return b""
        return b"".join(passing)

    def _look(self, event: bytes) -> None:
        seen = self.seen
        if _TEXT.search(event):
            seen.token_events += 1
            self.reasoned = self.reasoned or bool(_REASONING.search(event))
        finish = _FINISH.search(event)
        if finish is not None:
            seen.finish_reason = finish[1].decode()
            if seen.finish_reason == "abort":
                seen.failure = seen.failure or Failure(500, "the worker aborted the request")
        if _ERROR.search(event):
            seen.failure = failure_in(data(event)) or seen.failure
        if _USAGE.search(event):
            seen.usage = usage_in(data(event)) or seen.usage
        self.done = self.done or bool(_DONE.match(event))

    def _rewritten(self, event: bytes) -> bytes:
        part = self._continues
        if part is None:
            return event
        event = event.replace(part.own_id, part.id, 1)
        if not _USAGE.search(event):
            return event
        body = data(event)
        usage = body.get("usage") if isinstance(body, dict) else None
        if not isinstance(usage, dict):
            return event
        for name, change in (("prompt_tokens", -part.generated_tokens), ("completion_tokens", part.generated_tokens)):
            if type(usage.get(name)) is int:
                usage[name] += change
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict) and type(details.get("cached_tokens")) is int:
            # Of the answer so far, a part may have been cached too.
            details["cached_tokens"] = min(details["cached_tokens"], usage.get("prompt_tokens") or 0)
        return encoded(body)
