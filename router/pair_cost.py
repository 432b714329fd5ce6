"""Our policy: the pair that costs the least, a hot prefix on as many workers as it needs.

Pairs whose cost is above the least by no more than `tie_fraction` of what the whole prompt costs
are equals: then the prefill worker that was sent the fewest tokens lately gets the request
(where nobody holds any of the prompt, of those with the shortest wait), then the decode worker with
the fewest tokens in flight, and then a hash of seed and request decides. So idle workers fill
evenly, a page that all prompts share gathers nothing, and none gets more because of its name.

A prefix is hot when more than `hot_requests` requests in flight begin with it, for each worker that
holds it. The next such request goes to the cheapest worker that does not hold it, which is
thereby made a holder: one worker's queue is not what the prefix's users wait for, and it does not
die with one worker. The copy must be worth its work: `copy_tokens` for each request that uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import xxhash

from router.config import CostConfig
from router.pairs import Pairs
from router.policy import Ask, DecodeView, Pick, Policy, PrefillView

HOT_SHARE = 0.5
"""A match that is less of the prompt than this makes nothing hot: the prompt's own part matters more."""
ROUNDING = 1e-9
"""A sum and its parts differ by less than this, relatively."""
HOLDER_SHARE = 0.9
"""Who holds so much of the longest match counts as a holder."""


class _Heat(NamedTuple):
    """How much a request's longest match is in use."""

    requests: int
    holders: int


class PairCost(Policy):
    """`mainstem`: see above. Deterministic in its inputs and its seed; it remembers nothing."""

    name = "mainstem"

    def __init__(self, config: CostConfig, seed: int) -> None:
        self._config = config
        self._seed = seed

    def choose(self, ask: Ask, pairs: Pairs) -> Pick:
        alpha = self._config.alpha
        near_s = [view.wait_s + seconds for view, seconds in zip(pairs.prefills, pairs.weighed_s(alpha), strict=True)]
        cost_s = [near + far for near, far in zip(near_s, pairs.least_decode_s, strict=True)]
        tolerance_s = self._config.tie_fraction * alpha * pairs.whole_prompt_s
        reason = ""
        heat = _heat(pairs)
        if heat is not None and heat.requests > self._config.hot_requests * heat.holders:
            copies_s = self._copies(pairs, cost_s, heat)
            if min(copies_s) < inf:
                cost_s = copies_s
                reason = f"copied: {heat.requests} requests use what {_workers(heat.holders)} held"
        bound_s = min(cost_s) + tolerance_s
        tied = [row for row, cost in enumerate(cost_s) if cost <= bound_s]
        left_s = bound_s + ROUNDING * max(1.0, bound_s)
        prefill, decode = self._least(ask, pairs, tied, [left_s - near_s[row] for row in tied])
        return Pick(prefill, decode, reason or _reason(pairs, prefill, tied))

    def _copies(self, pairs: Pairs, cost_s: Sequence[float], heat: _Heat) -> list[float]:
        """The costs of those that do not hold the prefix and that a copy is worth its work on; of others infinite."""
        short = HOLDER_SHARE * pairs.longest
        least = pairs.ask.prompt_tokens - self._config.copy_tokens * heat.requests
        return [cost if least <= matched < short else inf for cost, matched in zip(cost_s, pairs.matched, strict=True)]

    def _least(
        self, ask: Ask, pairs: Pairs, tied: Sequence[int], left_s: Sequence[float]
    ) -> tuple[PrefillView, DecodeView]:
        """Of equal pairs, the one that was given the least lately.

        tied    prefill workers of equal pairs
        left_s  for each of these, what its decode side may cost
        """
        if len(tied) > 1 and not pairs.longest:
            idlest_s = min(pairs.prefills[row].wait_s for row in tied)
            idle = [place for place, row in enumerate(tied) if pairs.prefills[row].wait_s == idlest_s]
            tied, left_s = [tied[place] for place in idle], [left_s[place] for place in idle]
        if len(tied) > 1:
            fewest = min(pairs.prefills[row].recent_tokens for row in tied)
            kept = [place for place, row in enumerate(tied) if pairs.prefills[row].recent_tokens == fewest]
        else:
            kept = [0]
        found = [
            (view, decode)
            for place, view in ((place, pairs.prefills[tied[place]]) for place in kept)
            for decode, seconds in zip(pairs.partners(view), pairs.decode_s(view), strict=True)
            if seconds <= left_s[place]
        ]
        if len(found) > 1:
            fewest_inflight = min(decode.inflight_tokens for _, decode in found)
            found = [pair for pair in found if pair[1].inflight_tokens == fewest_inflight]
        if len(found) > 1:
            found.sort(key=lambda pair: (pair[0].name, pair[1].name))
            return found[xxhash.xxh3_64_intdigest(f"{self._seed}\0{ask.number}".encode()) % len(found)]
        return found[0]


def _heat(pairs: Pairs) -> _Heat | None:
    """None where no match is long enough for its prompt."""
    longest = pairs.longest
    if not longest or longest < HOT_SHARE * pairs.ask.prompt_tokens:
        return None
    holders = [
        view for view, matched in zip(pairs.prefills, pairs.matched, strict=True) if matched >= HOLDER_SHARE * longest
    ]
    return _Heat(sum(view.sharing_requests for view in holders), len(holders))


def _reason(pairs: Pairs, chosen: PrefillView, tied: Sequence[int]) -> str:
    held, most = pairs.matched_tokens(chosen), pairs.longest
    if len(pairs.prefills) == 1:
        return f"only prefill worker, holds {held} tokens"
    if held and held >= most:
        longer_s = chosen.wait_s - min(view.wait_s for view in pairs.prefills)
        worth = f", worth waiting {longer_s * 1000:.0f} ms longer" if longer_s > 0 else ""
        return f"cache: holds {held} tokens{worth}"
    holder = pairs.matched.index(most)
    if len(tied) > 1 and (not most or holder in tied):
        return f"equals: sent the fewest tokens lately, the longest match is {most} tokens"
    if held:
        return f"spill: holds {held} tokens, {_not_taken(pairs.prefills[holder], most, chosen)}"
    if most:
        return f"load: {_not_taken(pairs.prefills[holder], most, chosen)}"
    return "load: nobody holds this prefix"


def _not_taken(view: PrefillView, tokens: int, chosen: PrefillView) -> str:
    """Why the holder of the longest match did not get the request."""
    if view.wait_s > chosen.wait_s:
        why = f"would wait {view.wait_s * 1000:.0f} ms"
    elif view.trust < chosen.trust:
        why = "that is not sure"
    else:
        why = "is slower"
    return f"{view.name} holds {tokens} tokens but {why}"


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"
