"""Choose the pair of workers for one request, and say why.

Every pair (prefill worker, decode worker) has a cost (`router.cost`); the cheapest is
taken. Pairs whose costs differ by less than `tie_fraction` are equals: then the
prefill worker that was sent the fewest uncached tokens lately gets it, then the
decode worker with the fewest tokens in flight, and then a hash of seed and request
decides. So idle workers fill evenly, and none gets more because of its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from router.config import CostConfig
from router.cost import decode_pressure, prefill_seconds, transfer_seconds, wait_seconds


class NoWorker(Exception):
    """Nobody can take the request now; the same request may work later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillView:
    """What the choice needs to know of a worker that can prefill."""

    name: str
    held_pages: int = 0
    """Leading pages of this prompt that it holds."""
    exact: bool = True
    """Whether the index knows its pages; if not, what it is said to hold counts half."""
    outstanding_tokens: int = 0
    outstanding_requests: int = 0
    recent_tokens: float = 0.0
    alone: bool = False
    """It decodes what it prefills: it is its own pair, and no other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeView:
    """What the choice needs to know of a worker that can decode."""

    name: str
    held_pages: int = 0
    running_requests: int = 0
    inflight_tokens: int = 0
    alone: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One pair and the terms of its cost, in milliseconds."""

    prefill: str
    decode: str
    matched_tokens: int
    wait_ms: float
    prefill_ms: float
    transfer_ms: float
    pressure_ms: float
    cost_ms: float
    tied: bool
    """Whether it is as good as the cheapest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Where a request goes, and the reasons."""

    prefill: str
    decode: str
    prompt_tokens: int
    matched_tokens: int
    """Leading tokens that the prefill worker need not compute."""
    reason: str
    """Why this prefill worker, in a few words."""
    cache_choice: str
    """The prefill worker that a choice by cached tokens alone would have taken."""
    load_choice: str
    """The prefill worker that a choice by load alone would have taken."""
    candidates: tuple[Candidate, ...]

    @property
    def uncached_tokens(self) -> int:
        return self.prompt_tokens - self.matched_tokens


@dataclass(frozen=True, slots=True)
class _Pair:
    prefill: PrefillView
    decode: DecodeView
    matched_tokens: int
    wait_s: float
    prefill_s: float
    transfer_s: float
    pressure_s: float

    @property
    def cost_s(self) -> float:
        return self.wait_s + self.prefill_s + self.transfer_s + self.pressure_s


def usable_tokens(pages: int, prompt_tokens: int, page_tokens: int) -> int:
    """Tokens of `pages` that an engine can use: whole pages, and it always computes the last token itself."""
    return max(0, min(pages, (prompt_tokens - 1) // page_tokens)) * page_tokens


def choose(
    prefills: Sequence[PrefillView],
    decodes: Sequence[DecodeView],
    *,
    prompt_tokens: int,
    page_tokens: int,
    cost: CostConfig,
    seed: int,
    number: int,
) -> Decision:
    """The pair expected to answer first, with what a kept prefix is worth later.

    prompt_tokens  length of the prompt
    page_tokens    tokens a page
    number         of the request: with `seed`, it decides between equals

    Raises NoWorker where no pair can be made.
    """
    pairs = [
        _weigh(prefill, decode, prompt_tokens, page_tokens, cost)
        for prefill in prefills
        for decode in decodes
        if prefill.alone == decode.alone and (not prefill.alone or prefill.name == decode.name)
    ]
    if not pairs:
        raise NoWorker(f"no pair of workers is ready: {len(prefills)} can prefill, {len(decodes)} can decode")

    def tie_break(pair: _Pair) -> tuple[float, int, int]:
        names = f"{seed}\0{number}\0{pair.prefill.name}\0{pair.decode.name}"
        return pair.prefill.recent_tokens, pair.decode.inflight_tokens, xxhash.xxh3_64_intdigest(names.encode())

    cheapest_s = min(pair.cost_s for pair in pairs)
    bound_s = cheapest_s * (1 + cost.tie_fraction)
    tied = [pair for pair in pairs if pair.cost_s <= bound_s]
    chosen = min(tied, key=tie_break)
    by_cache = min(pairs, key=lambda pair: (-pair.matched_tokens, tie_break(pair)))
    by_load = min(pairs, key=lambda pair: (pair.wait_s + pair.pressure_s, tie_break(pair)))
    return Decision(
        prefill=chosen.prefill.name,
        decode=chosen.decode.name,
        prompt_tokens=prompt_tokens,
        matched_tokens=chosen.matched_tokens,
        reason=_reason(chosen, by_cache, by_load, tied, len(prefills)),
        cache_choice=by_cache.prefill.name,
        load_choice=by_load.prefill.name,
        candidates=tuple(_candidate(pair, bound_s) for pair in pairs),
    )


def _weigh(prefill: PrefillView, decode: DecodeView, prompt_tokens: int, page_tokens: int, cost: CostConfig) -> _Pair:
    matched = usable_tokens(prefill.held_pages, prompt_tokens, page_tokens)
    counted = matched if prefill.exact else matched // 2
    pages = -(-prompt_tokens // page_tokens)
    missing_pages = 0 if decode.alone else max(0, pages - decode.held_pages)
    return _Pair(
        prefill=prefill,
        decode=decode,
        matched_tokens=matched,
        wait_s=wait_seconds(prefill.outstanding_tokens, prefill.outstanding_requests, cost),
        prefill_s=cost.alpha * prefill_seconds(prompt_tokens - counted, prompt_tokens, cost),
        transfer_s=transfer_seconds(missing_pages, cost),
        pressure_s=decode_pressure(decode.running_requests, cost),
    )


def _candidate(pair: _Pair, bound_s: float) -> Candidate:
    return Candidate(
        prefill=pair.prefill.name,
        decode=pair.decode.name,
        matched_tokens=pair.matched_tokens,
        wait_ms=_ms(pair.wait_s),
        prefill_ms=_ms(pair.prefill_s),
        transfer_ms=_ms(pair.transfer_s),
        pressure_ms=_ms(pair.pressure_s),
        cost_ms=_ms(pair.cost_s),
        tied=pair.cost_s <= bound_s,
    )


def _reason(chosen: _Pair, by_cache: _Pair, by_load: _Pair, tied: Sequence[_Pair], prefills: int) -> str:
    held, most = chosen.matched_tokens, by_cache.matched_tokens
    if prefills == 1:
        return f"only prefill worker, holds {held} tokens"
    if held and held >= most:
        longer_s = chosen.wait_s - by_load.wait_s
        worth = f", worth waiting {_ms(longer_s):.0f} ms longer" if longer_s > 0 else ""
        return f"cache: holds {held} tokens{worth}"
    equals = {pair.prefill.name for pair in tied}
    if len(equals) > 1 and (not most or by_cache.prefill.name in equals):
        return f"equals: sent the fewest tokens lately, the longest match is {most} tokens"
    if most:
        return f"load: {by_cache.prefill.name} holds {most} tokens but would wait {_ms(by_cache.wait_s):.0f} ms"
    return "load: nobody holds this prefix"


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
