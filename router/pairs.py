"""Every pair (prefill worker, decode worker) for one request, with the terms of its cost in seconds.

    cost(p, d) = wait(p) + weighed(p) + transfer(p, d) + pressure(d)         `router.cost` says why

The terms are computed when somebody first asks: most baselines never do, and they are what a
request's explanation shows whoever chose. What is of one worker stands in lists: of a few dozen, making
arrays takes longer than the arithmetic. What is of a pair is a matrix: of a few dozen, there are thousands.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from router.bandwidths import Floats
from router.cost import CostModel
from router.policy import Ask, DecodeView, NoWorker, PrefillView, usable_tokens


class Pairs:
    """The workers that can take a request. Raises NoWorker where no two of them make a pair."""

    def __init__(
        self, ask: Ask, prefills: Sequence[PrefillView], decodes: Sequence[DecodeView], model: CostModel
    ) -> None:
        self.ask = ask
        self._model = model
        self._alone = {decode.name: decode for decode in decodes if decode.alone}
        self.decodes = [decode for decode in decodes if not decode.alone] if self._alone else decodes
        """Workers that decode what others prefill."""
        self.prefills = [view for view in prefills if (view.name in self._alone if view.alone else self.decodes)]
        if not self.prefills:
            raise NoWorker(f"no pair of workers is ready: {len(prefills)} can prefill, {len(decodes)} can decode")

    def partners(self, prefill: PrefillView) -> Sequence[DecodeView]:
        """Decode workers that this prefill worker makes a pair with; at least one."""
        return (self._alone[prefill.name],) if prefill.alone else self.decodes

    def idlest_partner(self, prefill: PrefillView) -> DecodeView:
        """The one with the fewest requests, then the fewest tokens; of equals, the first."""
        return min(self.partners(prefill), key=lambda view: (view.running_requests, view.inflight_tokens))

    def matched_tokens(self, prefill: PrefillView) -> int:
        """Leading tokens of the prompt that this worker need not compute, or is computing for somebody else."""
        return self.matched[self.row(prefill)]

    def row(self, prefill: PrefillView) -> int:
        """Where this worker stands in the lists."""
        return self.prefills.index(prefill)

    @cached_property
    def matched(self) -> list[int]:
        """`matched_tokens` of every prefill worker."""
        page_tokens = self.ask.page_tokens
        most = usable_tokens(self._prompt_pages, self.ask.prompt_tokens, page_tokens)
        return [min(most, page_tokens * max(view.held_pages, view.expected_pages)) for view in self.prefills]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest match."""
        return max(self.matched)

    @cached_property
    def prefill_s(self) -> list[float]:
        """By prefill worker, until the prompt is computed once begun. What the index is not sure of counts less."""
        return self._model.at_own_speed_s([view.name for view in self.prefills], self._usual_prefill_s)

    def weighed_s(self, alpha: float) -> list[float]:
        """By prefill worker, what its prefill counts: `alpha` times, at its own speed only once."""
        both = zip(self.prefill_s, self._usual_prefill_s, strict=True)
        return [own_s + (alpha - 1) * usual_s for own_s, usual_s in both]

    @cached_property
    def lacking_tokens(self) -> list[float]:
        """By prefill worker, the tokens that it is expected to compute."""
        tokens = self.ask.prompt_tokens
        return [
            tokens - (matched if view.trust == 1.0 else self._counted(view, matched))
            for view, matched in zip(self.prefills, self.matched, strict=True)
        ]

    @cached_property
    def whole_prompt_s(self) -> float:
        """What the prompt would take a worker that holds nothing of it, at the fleet's usual speed."""
        return self._model.prefill_s("", self.ask.prompt_tokens, self.ask.prompt_tokens)

    def decode_s(self, prefill: PrefillView) -> Sequence[float]:
        """What remains after the prefill, for each of its partners: transfer and pressure."""
        if prefill.alone:
            return (self.pressure_s(self._alone[prefill.name]),)
        if self._model.knows_bandwidths:
            row: list[float] = self._decode_s[self._apart.index(prefill.name)].tolist()
            return row
        return self._usual_decode_s

    @cached_property
    def least_decode_s(self) -> list[float]:
        """By prefill worker, the least of its `decode_s`."""
        if not self._apart:
            return [self.pressure_s(self._alone[view.name]) for view in self.prefills]
        if self._model.knows_bandwidths:
            apart: list[float] = self._decode_s.min(axis=1).tolist()
        else:
            apart = [min(self._usual_decode_s)] * len(self._apart)
        if not self._alone:
            return apart
        least = iter(apart)
        return [self.pressure_s(self._alone[view.name]) if view.alone else next(least) for view in self.prefills]

    def transfer_s(self, prefill: PrefillView, decode: DecodeView) -> float:
        """To hand over what decode lacks."""
        return 0.0 if prefill.alone else self._missing_pages(decode) * self._model.page_s(prefill.name, decode.name)

    def pressure_s(self, decode: DecodeView) -> float:
        """What this request costs those that decode there."""
        return self._model.pressure_s(decode.running_requests)

    @cached_property
    def _usual_prefill_s(self) -> list[float]:
        """`prefill_s` if none were slower or faster than usual."""
        return self._model.usual_prefills_s(self.lacking_tokens, self.ask.prompt_tokens)

    @cached_property
    def _apart(self) -> list[str]:
        """Prefill workers that hand over."""
        return [view.name for view in self.prefills if not view.alone]

    @cached_property
    def _decode_s(self) -> Floats:
        """`decode_s` of those. Shape: (prefill, decode)."""
        missing_pages = np.array([self._missing_pages(view) for view in self.decodes], float)
        pressure_s = np.array([self.pressure_s(view) for view in self.decodes])
        page_s = self._model.pages_s(self._apart, [view.name for view in self.decodes])
        found: Floats = page_s * missing_pages + pressure_s
        return found

    @cached_property
    def _usual_decode_s(self) -> list[float]:
        """`decode_s` of each of those, while no bandwidth is known."""
        page_s = self._model.page_s("", "")
        return [self._missing_pages(view) * page_s + self.pressure_s(view) for view in self.decodes]

    @cached_property
    def _prompt_pages(self) -> int:
        return -(-self.ask.prompt_tokens // self.ask.page_tokens)

    def _missing_pages(self, decode: DecodeView) -> int:
        return max(0, self._prompt_pages - decode.held_pages)

    def _counted(self, view: PrefillView, matched: int) -> float:
        if view.expected_pages > view.held_pages:
            return matched if view.trust else 0
        return matched * view.trust
