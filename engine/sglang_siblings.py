"""Prefill's scheduler forms a pass without the requests that would compute what it computes already (engine.siblings).

They keep their places in SGLang's queue. Whoever they let go first is computed in this pass or the one under way, or is
what keeps the queue waiting: so nobody waits for one who does not come. Where SGLang is told to take requests in
another order than they came, it is left to it.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Sequence
from typing import Any

from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from engine.siblings import LEAST_TOKENS, Cached, Prompt, followers
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
    if getattr(cache, "disable", True) or not _in_turn(scheduler):
        return []
    last = scheduler.last_batch
    # In a mixed pass requests are that only decode.
    passing = last is not None and last.forward_mode.is_extend() and not last.forward_mode.is_mixed()
    under_way = list(last.reqs) if passing else []
    if scheduler.chunked_req is not None:
        under_way.append(scheduler.chunked_req)
    if len(queue) + len(under_way) < 2:
        return []
    least = max(LEAST_TOKENS, scheduler.page_size)
    waiting = (_prompt(cache, request, least) for request in queue)
    return [queue[place] for place in followers(waiting, [_prompt(cache, one, least) for one in under_way])]


def _in_turn(scheduler: Any) -> bool:
    """Whether whoever came first goes first: one for whom others wait must not be passed over."""
    first_come = scheduler.policy.policy.value == "fcfs" and not scheduler.enable_priority_scheduling
    return first_come and not scheduler.enable_hicache_storage


def _prompt(cache: Any, request: Any, least: int) -> Prompt:
    def cached() -> Cached:
        found = cache.match_prefix(MatchPrefixParams(key=RadixKey(request.origin_input_ids, request.extra_key)))
        return Cached(found.last_host_node.id, len(found.device_indices) + int(found.host_hit_length))

    # What these may take from the cache is another matter than what it has.
    special = request.return_logprob or request.session is not None
    return Prompt(array("q") if special else request.origin_input_ids, request.extra_key, cached, least)


def _in_order(before: Sequence[Any], held: Sequence[Any], left: Sequence[Any]) -> list[Any]:
    """Who still waits, in the old order; behind them who came meanwhile."""
    known, waits = {id(request) for request in before}, {id(request) for request in (*held, *left)}
    return [one for one in before if id(one) in waits] + [one for one in left if id(one) not in known]
