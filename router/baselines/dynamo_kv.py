"""Dynamo's `kv` router with its default weights: prefill work plus blocks in use, both in blocks.

    cost(w) = max(0, (active prefill tokens(w) + prompt tokens) / page tokens - held pages(w)) + active blocks(w)

Active blocks are those of the requests that run there, this one included, and shared ones count once. So a
cold worker costs a whole prompt more than one that holds it, while each further request of a hot prefix
costs the hot worker one block: it stays hot. Equal costs are drawn by lot.

Where prefill and decode are apart, Dynamo has two routers. The one for prefill workers tracks no
active blocks; the one for decode workers looks at nothing else, and shares none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from router.baselines.active_blocks import ActiveBlocks
from router.baselines.order import chance
from router.policy import Ask, DecodeView, Pick, Policy, PrefillView

if TYPE_CHECKING:
    from router.pairs import Pairs


class _Running(NamedTuple):
    worker: str
    active: ActiveBlocks | None
    """Where the worker does both parts."""
    ids: Sequence[int]
    blocks: int


class DynamoKv(Policy):
    """The load in tokens is the router's own count of what it sent, as with Dynamo."""

    name = "dynamo_kv"

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._active: dict[str, ActiveBlocks] = {}
        self._decoding: Counter[str] = Counter()
        """Blocks by decode worker, none shared."""
        self._running: dict[int, _Running] = {}

    def choose(self, ask: Ask, pairs: Pairs) -> Pick:
        prefill = min(
            pairs.prefills,
            key=lambda view: (self._cost(ask, view), chance(self._seed, ask.number, view.name)),
        )
        decode = min(pairs.partners(prefill), key=lambda view: self._decode_order(ask, view))
        return Pick(prefill, decode, f"cost of {self._cost(ask, prefill):.1f} blocks, {prefill.held_pages} held")

    def sent(self, ask: Ask, prefill: str, decode: str) -> None:
        self.ended(ask.number)  # sent again: the first try is over
        if prefill == decode:
            active = self._active.setdefault(prefill, ActiveBlocks())
            active.add(ask.ids)
            self._running[ask.number] = _Running(prefill, active, ask.ids, 0)
        else:
            blocks = -(-ask.prompt_tokens // ask.page_tokens)
            self._decoding[decode] += blocks
            self._running[ask.number] = _Running(decode, None, (), blocks)

    def ended(self, number: int) -> None:
        running = self._running.pop(number, None)
        if running is None:
            return
        if running.active is not None:
            running.active.remove(running.ids)
        elif running.worker in self._decoding:
            self._decoding[running.worker] -= running.blocks

    def lost(self, worker: str) -> None:
        # What ran there may still be told to end; it must not be taken from the worker's next life.
        self._active.pop(worker, None)
        self._decoding.pop(worker, None)
        for number in [number for number, running in self._running.items() if running.worker == worker]:
            del self._running[number]

    def _cost(self, ask: Ask, view: PrefillView) -> float:
        to_prefill = (view.outstanding_tokens + ask.prompt_tokens) / ask.page_tokens - view.held_pages
        return max(0.0, to_prefill) + (self._active_blocks(ask, view.name) if view.alone else 0)

    def _active_blocks(self, ask: Ask, worker: str) -> int:
        active = self._active.get(worker)
        return len(ask.ids) if active is None else active.with_request(ask.ids)

    def _decode_order(self, ask: Ask, view: DecodeView) -> tuple[int, int]:
        return self._decoding[view.name], chance(self._seed, ask.number, view.name)
