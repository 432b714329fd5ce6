"""Where a request goes and why. An explanation is written out only for who asks for it.

What the choice looked at is kept; terms that it did not need are computed when somebody asks, by what
the cost model knows then.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec

from router.pairs import Pairs
from router.policy import Pick, PrefillView

SHOWN_CANDIDATES = 32
"""Of thousands of pairs, those with the least cost are told of, and always the chosen one."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One pair and the terms of its cost, in milliseconds."""

    prefill: str
    decode: str
    matched_tokens: int
    """Leading tokens that the prefill worker need not compute for this request."""
    expected_tokens: int
    """Of those, the ones that it is computing just now for another."""
    wait_ms: float
    prefill_ms: float
    """Weighed by alpha (`router.cost`)."""
    transfer_ms: float
    pressure_ms: float
    cost_ms: float


@dataclass(frozen=True)
class Decision:
    """Where one request goes, and the reasons.

    policy  name of who picked
    alpha   what a second of prefill counts in `candidates`
    """

    pairs: Pairs
    pick: Pick
    policy: str
    alpha: float

    @property
    def prefill(self) -> str:
        return self.pick.prefill.name

    @property
    def decode(self) -> str:
        return self.pick.decode.name

    @property
    def reason(self) -> str:
        """Why this prefill worker, in a few words."""
        return self.pick.reason

    @property
    def kind(self) -> str:
        """The first word of the reason: it has no numbers and no names, of which there is no end."""
        return self.reason.partition(" ")[0].rstrip(":,")

    @property
    def prompt_tokens(self) -> int:
        return self.pairs.ask.prompt_tokens

    @cached_property
    def matched_tokens(self) -> int:
        """Leading tokens that the prefill worker need not compute."""
        return self.pairs.matched_tokens(self.pick.prefill)

    @property
    def matched_pages(self) -> int:
        """What the worker is known or expected to hold of the prompt; it may be more than it can use."""
        return max(self.pick.prefill.held_pages, self.pick.prefill.expected_pages)

    @cached_property
    def uncached_tokens(self) -> int:
        """What the prefill worker is expected to compute: more than it is said to lack, where that is not sure."""
        return int(self.pairs.lacking_tokens[self.pairs.row(self.pick.prefill)])

    @cached_property
    def expected_s(self) -> float:
        """From dispatch until decode has the pages."""
        pairs, pick = self.pairs, self.pick
        prefill_s = pairs.prefill_s[pairs.row(pick.prefill)]
        return pick.prefill.wait_s + prefill_s + pairs.transfer_s(pick.prefill, pick.decode)

    @cached_property
    def cache_choice(self) -> str:
        """The prefill worker that a choice by cached tokens alone would have taken; of equals, the least loaded."""
        pairs = self.pairs
        rows = range(len(pairs.prefills))
        return pairs.prefills[min(rows, key=lambda row: (-pairs.matched[row], pairs.prefills[row].wait_s))].name

    @cached_property
    def load_choice(self) -> str:
        """The prefill worker that a choice by load alone would have taken; of equals, the one sent the least lately."""
        pairs = self.pairs

        def load(view: PrefillView) -> tuple[float, float]:
            return view.wait_s + min(map(pairs.pressure_s, pairs.partners(view))), view.recent_tokens

        return min(pairs.prefills, key=load).name

    def explained(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {
            "prefill": self.prefill,
            "decode": self.decode,
            "prompt_tokens": self.prompt_tokens,
            "matched_tokens": self.matched_tokens,
            "policy": self.policy,
            "alpha": self.alpha,
            "reason": self.reason,
            "cache_choice": self.cache_choice,
            "load_choice": self.load_choice,
            "pairs": sum(len(self.pairs.partners(view)) for view in self.pairs.prefills),
            "candidates": [msgspec.structs.asdict(candidate) for candidate in self.candidates],
        }

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """The pairs that cost the least and the chosen one, cheapest first."""
        pairs, found = self.pairs, []
        for view, matched, weighed_s in zip(pairs.prefills, pairs.matched, pairs.weighed_s(self.alpha), strict=True):
            near_s = view.wait_s + weighed_s
            for decode, far_s in zip(pairs.partners(view), pairs.decode_s(view), strict=True):
                found.append((near_s + far_s, view, decode, matched, weighed_s))
        found.sort(key=lambda pair: pair[0])
        chosen = (self.prefill, self.decode)
        shown = found[:SHOWN_CANDIDATES]
        shown += [pair for pair in found[SHOWN_CANDIDATES:] if (pair[1].name, pair[2].name) == chosen]
        return tuple(
            Candidate(
                prefill=view.name,
                decode=decode.name,
                matched_tokens=matched,
                expected_tokens=max(0, matched - view.held_pages * pairs.ask.page_tokens),
                wait_ms=_ms(view.wait_s),
                prefill_ms=_ms(weighed_s),
                transfer_ms=_ms(pairs.transfer_s(view, decode)),
                pressure_ms=_ms(pairs.pressure_s(decode)),
                cost_ms=_ms(cost_s),
            )
            for cost_s, view, decode, matched, weighed_s in shown
        )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
