"""Prefill hands pages over when their pass is done, and not later: beside SGLang's overlap, and its optimism.

With the overlap, SGLang looks at a pass's result when the next pass has been put into its stream, and only then asks
the GPU for the pages to send, in a stream that waits for that next pass. Here it asks aside (`SlotReader`), unless the
request's slots were changed just before: the cache found that it held the same tokens already, and gave the request
its own pages.

A request that was computed before decode had pages for it is sent, where it has by then, with the others of its pass.
SGLang would send it once it has written its statistics and log.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.mem_cache.chunk_cache import ChunkCache
from sglang.srt.mem_cache.radix_cache import RadixCache
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from engine.sglang_slots import SlotReader

_KNOWN_CACHES = (RadixCache, ChunkCache)
"""Of which it is known when they change a request's slots. What a kind of one does is not."""


class OverlapHooks:
    """Act on requests with a sender of ours, which has `slots_changed`."""

    def __init__(self, reader: SlotReader) -> None:
        self._reader = reader
        self._early = False
        """Whether what is being sent was in the cache before its pass: its slots are just being written."""
        self._held_tokens = 0
        """What the cache had of a prompt that was put into it last."""

    def register(self) -> None:
        scheduler = "sglang.srt.managers.scheduler.Scheduler."
        cache = "sglang.srt.mem_cache.radix_cache.RadixCache."
        HookRegistry.register(scheduler + "process_batch_result_disagg_prefill", self.granted, HookType.BEFORE)
        HookRegistry.register(scheduler + "send_kv_chunk", self.send, HookType.AROUND)
        HookRegistry.register(scheduler + "maybe_send_cached_prefix_chunk", self.send_early, HookType.AROUND)
        HookRegistry.register(cache + "insert", self.inserted, HookType.AFTER)
        HookRegistry.register(cache + "cache_unfinished_req", self.cached, HookType.AROUND)

    def granted(self, scheduler: Any, batch: Any, result: Any) -> None:
        """Finds the optimistic requests to which decode has granted pages while their last chunk was computed."""
        optimistic = [
            request
            for request in batch.reqs
            if request.pending_bootstrap
            and request.inflight_middle_chunks <= 0
            and hasattr(request.disagg_kv_sender, "slots_changed")
        ]
        if optimistic and result.copy_done is not None:
            # As SGLang does next: until then the grants still come.
            result.copy_done.synchronize()
        for request in optimistic:
            if request.disagg_kv_sender.poll() == KVPoll.WaitingForInput:
                scheduler.disagg_prefill_bootstrap_queue.finalize_bootstrap(request)

    def send(self, original: Any, scheduler: Any, request: Any, *arguments: Any, **named: Any) -> None:
        sender = request.disagg_kv_sender
        aside = (
            scheduler.enable_overlap
            and not self._early
            and not getattr(sender, "slots_changed", True)
            and type(scheduler.tree_cache) in _KNOWN_CACHES
        )
        with self._reader.aside() if aside else nullcontext():
            original(scheduler, request, *arguments, **named)
        if not self._early and hasattr(sender, "slots_changed"):
            sender.slots_changed = False

    def send_early(self, original: Any, scheduler: Any, request: Any) -> None:
        """What the cache had goes ahead with the rest where pages do: to ask which they are would be to wait."""
        if scheduler.enable_overlap and getattr(request.disagg_kv_sender, "leaves_ahead", False):
            return
        self._early = True
        try:
            original(scheduler, request)
        finally:
            self._early = False

    def inserted(self, result: Any, *_arguments: Any, **_named: Any) -> None:
        self._held_tokens = result.prefix_len

    def cached(self, original: Any, cache: Any, request: Any, *arguments: Any, **named: Any) -> None:
        own_from = request.cache_protected_len
        self._held_tokens = 0
        original(cache, request, *arguments, **named)
        sender: Any = getattr(request, "disagg_kv_sender", None)
        if self._held_tokens > own_from and hasattr(sender, "slots_changed"):
            sender.slots_changed = True
