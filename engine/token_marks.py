"""Which tokens a running stream has told so far: SGLang's OpenAI answers have only their text.

A router needs the ids to go on with the stream elsewhere, and it may send on an event only when it knows them. So
each event of text is marked: with the tokens that came since the last complete one, where all text up to here is all
text of all tokens up to here; with MORE where it is not, as an incomplete character is held back, or the
answer's last words have come and its end has not.

    mainstem: 504,28
    data: {"choices": [{"text": "Hello,"}], ...}

    mainstem: +
    data: {"choices": [{"text": " "}], ...}

Server-sent events know no such field, and every client passes over it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

MORE = "mainstem: +\n"
WINDOW_TOKENS = 8
"""More than the bytes of any character, each of which may be a token of its own."""
INCOMPLETE = "\ufffd"
"""What a decoder writes for a character that is not whole."""


class Whole:
    """Whether a sequence of tokens ends with a whole character.

    decode  text of some token ids
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._alone: dict[int, bool] = {}
        """By token, whether it ends with one wherever it stands; at most the size of the vocabulary."""

    def __call__(self, ids: Sequence[int]) -> bool:
        last = ids[-1]
        if last not in self._alone:
            self._alone[last] = not self._decode([last]).endswith(INCOMPLETE)
        return self._alone[last] or not self._decode(ids[-WINDOW_TOKENS:]).endswith(INCOMPLETE)


class Marks:
    """The marks of one stream."""

    def __init__(self, whole: Whole) -> None:
        self._whole = whole
        self._told = 0
        self._reached = 0

    def reached(self, ids: Sequence[int], finished: bool) -> str:
        """The mark of an event after which all of `ids` have been generated; `told` follows where it is sent."""
        self._reached = self._told
        if finished or len(ids) <= self._told or not self._whole(ids):
            return MORE
        self._reached = len(ids)
        return f"mainstem: {','.join(map(str, ids[self._told :]))}\n"

    def told(self) -> None:
        """The last mark was sent."""
        self._told = self._reached
