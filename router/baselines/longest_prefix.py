"""The worker that holds the most of the prompt; of equals, the least loaded.

Where all prompts share a beginning, whoever computed it first gets everything: the collapse that
shows why a cache alone must not decide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.baselines.order import chance, token_load
from router.policy import Ask, Pick, Policy, usable_pages

if TYPE_CHECKING:
    from router.pairs import Pairs


class LongestPrefix(Policy):
    """By what the index says is held now."""

    name = "longest_prefix"

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def choose(self, ask: Ask, pairs: Pairs) -> Pick:
        def pages(held: int) -> int:
            return usable_pages(held, ask.prompt_tokens, ask.page_tokens)

        prefill = min(
            pairs.prefills,
            key=lambda view: (-pages(view.held_pages), token_load(view), chance(self._seed, ask.number, view.name)),
        )
        return Pick(prefill, pairs.idlest_partner(prefill), f"holds {pages(prefill.held_pages)} pages")
