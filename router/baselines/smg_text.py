"""`cache_aware` as sglang-router 0.3.2 and smg have it for HTTP workers: an approximate tree of what was sent.

    imbalanced = max - min > 64 and max > 1.5 * min          requests in flight of this router
    imbalanced                 -> the least loaded, the first of equals
    matched / length > 0.3     -> a worker that was sent the longest match
    else                       -> the least loaded, the first of equals

The tree knows what was dispatched, not what the engines kept: an evicted prefix still attracts.
It is of characters, four to a token; here of pages, so that a match may be short by less than a page.
A worker's part of the tree is bounded at once, theirs within a minute. Of several workers with the longest
match, theirs is whichever a hash map lists first; here it is the one that was sent anything first.

With equal loads, unrelated requests all go to the first worker, and a hot prefix stays on one worker
until it has 64 requests more than another. Both are kept: they are what is compared with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from router.page_lru import PageLru
from router.policy import Ask, Pick, Policy, PrefillView

if TYPE_CHECKING:
    from router.pairs import Pairs

CHARS_PER_TOKEN = 4
CACHE_THRESHOLD = 0.3
BALANCE_ABS_THRESHOLD = 64
BALANCE_REL_THRESHOLD = 1.5
MAX_TREE_CHARS = 67_108_864
"""A worker."""


class SmgCacheAwareText(Policy):
    """The arguments are smg's options of the same names."""

    name = "smg_cache_aware_text"

    def __init__(
        self,
        seed: int,
        cache_threshold: float = CACHE_THRESHOLD,
        balance_abs_threshold: int = BALANCE_ABS_THRESHOLD,
        balance_rel_threshold: float = BALANCE_REL_THRESHOLD,
        max_tree_chars: int = MAX_TREE_CHARS,
    ) -> None:
        self._cache_threshold = cache_threshold
        self._balance_abs_threshold = balance_abs_threshold
        self._balance_rel_threshold = balance_rel_threshold
        self._max_tree_tokens = max_tree_chars // CHARS_PER_TOKEN
        self._sent: dict[str, PageLru] = {}

    def choose(self, ask: Ask, pairs: Pairs) -> Pick:
        loads = [view.inflight_requests for view in pairs.prefills]
        idlest = min(pairs.prefills, key=lambda view: view.inflight_requests)
        if max(loads) - min(loads) > self._balance_abs_threshold and max(loads) > self._balance_rel_threshold * min(
            loads
        ):
            return self._pick(pairs, idlest, f"imbalanced: {min(loads)} to {max(loads)} requests")
        pages, tenant = self._longest(ask)
        rate = pages * ask.page_tokens / ask.prompt_tokens
        if rate <= self._cache_threshold:
            return self._pick(pairs, idlest, f"match of {rate:.2f}: least loaded")
        # A worker that cannot take requests is replaced by the first that can.
        matched = next((view for view in pairs.prefills if view.name == tenant), pairs.prefills[0])
        return self._pick(pairs, matched, f"match of {rate:.2f}")

    def sent(self, ask: Ask, prefill: str, decode: str) -> None:
        tree = self._sent.get(prefill)
        if tree is None:
            tree = self._sent[prefill] = PageLru(max(1, self._max_tree_tokens // ask.page_tokens))
        tree.use(ask.ids)

    def lost(self, worker: str) -> None:
        self._sent.pop(worker, None)

    def _longest(self, ask: Ask) -> tuple[int, str]:
        """The longest match, and who was sent it; 0 pages where nobody was."""
        best, tenant = 0, ""
        for name, tree in self._sent.items():
            pages = tree.match(ask.ids)
            if pages > best:
                best, tenant = pages, name
        return best, tenant

    @staticmethod
    def _pick(pairs: Pairs, prefill: PrefillView, reason: str) -> Pick:
        return Pick(prefill, pairs.idlest_partner(prefill), reason)
