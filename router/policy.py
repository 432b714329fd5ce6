"""What a policy is: it looks at one request and at every pair of workers, and picks a pair.

    Ask ──┐
          ├── Policy.choose ──> Pick         `router.pair_cost` is ours, `router.baselines` has the others
    Pairs ┘

A policy knows no clock, no sockets and no chance but its seed: the same inputs give the same
picks. One that remembers what it sent where is told of it: `sent`, `prefilled`, `ended`, `lost`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from router.pairs import Pairs


class NoWorker(Exception):
    """Nobody can take the request now; the same request may work later."""


class Ask(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request, as far as a choice of workers looks at it."""

    number: int
    """Of the request: with a policy's seed, it decides between equals."""
    prompt_tokens: int
    page_tokens: int
    guessed: bool = False
    """Whether the number of tokens is a guess: the prompt could not be tokenized."""
    ids: Sequence[int] = ()
    """Chain ids of the prompt's whole pages, first page first; none where the prompt is not known."""
    session: str = ""
    """What the client says it belongs to; "" where it says nothing."""
    now_s: float = 0.0
    """Seconds of a steady clock."""


class PrefillView(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a choice may know of a worker that can prefill."""

    name: str
    held_pages: int = 0
    """Leading pages of this prompt that it holds."""
    expected_pages: int = 0
    """Leading pages that it holds, or will when it has done what it was sent."""
    sharing_requests: int = 0
    """Requests in flight there whose prompts begin with the last of those pages."""
    trust: float = 1.0
    """What a page that it is said to hold is worth: 1 where the index knows its pages, 0 where it knows none."""
    wait_s: float = 0.0
    """Until it has computed what it was sent before, as the cost model expects it."""
    outstanding_tokens: int = 0
    """Uncached prompt tokens sent to it and not yet computed."""
    outstanding_requests: int = 0
    inflight_requests: int = 0
    """Requests sent to it that are not over yet, whichever part of them."""
    recent_tokens: float = 0.0
    """Tokens sent lately, fading: uncached ones, and all of a prompt's where the worker decodes them too."""
    capacity_tokens: int = 0
    alone: bool = False
    """It decodes what it prefills: it is its own pair, and no other."""


class DecodeView(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a choice may know of a worker that can decode."""

    name: str
    held_pages: int = 0
    running_requests: int = 0
    inflight_tokens: int = 0
    """Prompt tokens of the requests that decode there, or will."""
    capacity_tokens: int = 0
    alone: bool = False


class Pick(msgspec.Struct, frozen=True, gc=False):
    """The pair that gets the request, and why in a few words."""

    prefill: PrefillView
    decode: DecodeView
    reason: str


class Policy:
    """One way to choose. Not every policy remembers, so what they are told of changes nothing unless they say so."""

    name: str

    def choose(self, ask: Ask, pairs: Pairs) -> Pick:
        """The pair for this request. Changes nothing: what was chosen may never be sent."""
        raise NotImplementedError

    def sent(self, ask: Ask, prefill: str, decode: str) -> None:
        """The request was sent to this pair, whoever chose it."""

    def prefilled(self, number: int) -> None:
        """Its prefill is over, well or not."""

    def ended(self, number: int) -> None:
        """It is over. Follows `prefilled`."""

    def lost(self, worker: str) -> None:
        """The worker is gone, and what it held with it."""


def usable_pages(pages: int, prompt_tokens: int, page_tokens: int) -> int:
    """Of so many cached leading pages, those that an engine can use: it always computes the last token itself."""
    return max(0, min(pages, (prompt_tokens - 1) // page_tokens))


def usable_tokens(pages: int, prompt_tokens: int, page_tokens: int) -> int:
    """`usable_pages` in tokens."""
    return usable_pages(pages, prompt_tokens, page_tokens) * page_tokens
