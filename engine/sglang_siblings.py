"""Prefill's scheduler forms a pass without the requests that would compute what it computes already (engine.siblings).

They keep their places in SGLang's queue. Whoever they let go first is computed in this pass or the one under way, or is
what keeps the queue waiting: so nobody waits for one who does not come.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from engine.siblings import Prompt, followers
from engine.spec import SPEC_VARIABLE


class SiblingHook:
    """Acts in a worker of ours."""

    def register(self) -> None:
        HookRegistry.register(
            "sglang.srt.managers.scheduler.Scheduler.get_new_batch_prefill", self.form, HookType.AROUND
        )

    def form(self, original: Any, scheduler: Any, *arguments: Any, **named: Any) -> Any:
        """The next pass, of those that need not let another go first."""
        queue = scheduler.waiting_queue
        held = _held(scheduler, queue) if queue and SPEC_VARIABLE in os.environ else []
        if not held:
            return original(scheduler, *arguments, **named)
        absent = {id(request) for request in held}
        scheduler.waiting_queue = [request for request in queue if id(request) not in absent]
        try:
            return original(scheduler, *arguments, **named)
        finally:
            scheduler.waiting_queue = _in_order(queue, held, scheduler.waiting_queue)


def _held(scheduler: Any, queue: Sequence[Any]) -> list[Any]:
    cache = scheduler.tree_cache
    if getattr(cache, "disable", True):
        # There is nothing to be found one pass later.
        return []
    last = scheduler.last_batch
    under_way = list(last.reqs) if last is not None and last.forward_mode.is_extend() else []
    if scheduler.chunked_req is not None:
        under_way.append(scheduler.chunked_req)
    if len(queue) + len(under_way) < 2:
        return []
    waiting = [_prompt(cache, request) for request in queue]
    return [queue[place] for place in followers(waiting, [_prompt(cache, request) for request in under_way])]


def _prompt(cache: Any, request: Any) -> Prompt:
    def cached() -> int:
        found = cache.match_prefix(MatchPrefixParams(key=RadixKey(request.origin_input_ids, request.extra_key)))
        return len(found.device_indices) + int(found.host_hit_length)

    return Prompt(request.origin_input_ids, request.extra_key, cached)


def _in_order(before: Sequence[Any], held: Sequence[Any], left: Sequence[Any]) -> list[Any]:
    """Who still waits, in the old order; behind them who came meanwhile."""
    known, waits = {id(request) for request in before}, {id(request) for request in (*held, *left)}
    return [one for one in before if id(one) in waits] + [one for one in left if id(one) not in known]
