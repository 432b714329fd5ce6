"""Prefill hands pages over when their pass is done, and not later: beside SGLang's overlap, and its optimism.

With the overlap, SGLang looks at a pass's result when the next pass has been put into its stream, and only then asks
the GPU for the pages to send, in a stream that waits for that next pass. Here it asks aside (`SlotReader`), unless the
request's slots were changed just before: the cache found that it held the same tokens already, and gave the request
its own pages.

A request that was computed before decode had pages for it is sent, where it has by then, with the others of its pass.
SGLang would send it once it has written its statistics and log. And all that a pass has computed is sent before the
cache takes any of it in, which takes it milliseconds, where the cache cannot give it other slots.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.mem_cache.chunk_cache import ChunkCache
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from engine.sglang_slots import SlotReader

_KNOWN_CACHES = (RadixCache, ChunkCache)
"""Of which it is known when they change a request's slots. What a kind of one does is not."""
_Place = tuple[int, Any]
"""In a radix cache: a node, and the page that follows it."""


class OverlapHooks:
    """Act on requests with a sender of ours, which has `slots_changed`."""

    def __init__(self, reader: SlotReader, computed: Callable[[Any, Any, Any], None]) -> None:
        """computed  told of each pass (scheduler, batch, result) before anything is sent of it"""
        self._reader = reader
        self._computed = computed
        self._early = False
        """Whether what is being sent was in the cache before its pass: its slots are just being written."""
        self._held_tokens = 0
        """What the cache had of a prompt that was put into it last."""
        self._scheduler: Any = None
        """While it looks at the result of a pass."""
        self._sent: dict[_Place, Callable[[], bool]] = {}
        """What has the cache take in what was sent of this pass, and where it will; see `_cached`."""

    def register(self) -> None:
        scheduler = "sglang.srt.managers.scheduler.Scheduler."
        cache = "sglang.srt.mem_cache.radix_cache.RadixCache."
        HookRegistry.register(scheduler + "process_batch_result_disagg_prefill", self.result, HookType.AROUND)
        HookRegistry.register(scheduler + "send_kv_chunk", self.send, HookType.AROUND)
        HookRegistry.register(scheduler + "maybe_send_cached_prefix_chunk", self.send_early, HookType.AROUND)
        HookRegistry.register(cache + "insert", self.inserted, HookType.AFTER)
        HookRegistry.register(cache + "cache_unfinished_req", self.cached, HookType.AROUND)
        HookRegistry.register(cache + "cache_finished_req", self.released, HookType.BEFORE)

    def result(self, original: Any, scheduler: Any, batch: Any, result: Any) -> None:
        self.granted(scheduler, batch, result)
        self._computed(scheduler, batch, result)
        self._scheduler = scheduler
        try:
            original(scheduler, batch, result)
            self._take_in()
        finally:
            self._scheduler = None
            self._sent.clear()

    def granted(self, scheduler: Any, batch: Any, result: Any) -> None:
        """Finds the optimistic requests to which decode has granted pages while their last chunk was computed."""
        optimistic = [
            request
            for request in batch.reqs
            if request.pending_bootstrap
            and request.inflight_middle_chunks <= 0
            and hasattr(request.disagg_kv_sender, "slots_changed")
        ]
        # Most have been granted pages by now: what that takes is done beside the pass.
        late = _finalized(scheduler, optimistic)
        if late and result.copy_done is not None:
            # As SGLang does next: until then the grants still come.
            result.copy_done.synchronize()
        _finalized(scheduler, late)

    def send(self, original: Any, scheduler: Any, request: Any, *arguments: Any, **named: Any) -> None:
        sender = request.disagg_kv_sender
        if getattr(sender, "sent_first", False):
            return
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
        take_in = functools.partial(self._cached, original, cache, request, *arguments, **named)
        ready = self._scheduler is not None and _is_ready(self._scheduler, request)
        place = _grows(cache, request) if ready else None
        if place is None or place in self._sent:
            # It comes behind those before it. The cache may have more of the prompt than it gave the request, also of
            # another one of this pass: it frees the request's own slots then, and they may be another's before they
            # are read.
            self._take_in()
            take_in()
            return
        self._scheduler.send_kv_chunk(request, last_chunk=True)
        # As SGLang will do next.
        request.disagg_kv_sender.sent_first = True
        self._sent[place] = take_in

    def released(self, *_arguments: Any, **_named: Any) -> None:
        """What a request leaves behind in the cache comes behind what was sent of others."""
        self._take_in()

    def _take_in(self) -> None:
        sent, self._sent = self._sent, {}
        for take_in in sent.values():
            if take_in():
                # A cache that does what it did not do when this was written. Nobody must decode from such pages.
                raise RuntimeError("the cache gave a prompt other slots after its own were sent")

    def _cached(self, original: Any, cache: Any, request: Any, *arguments: Any, **named: Any) -> bool:
        """Whether the cache had more of the prompt than it gave the request, and so gives it other slots now."""
        own_from = request.cache_protected_len
        self._held_tokens = 0
        original(cache, request, *arguments, **named)
        sender: Any = getattr(request, "disagg_kv_sender", None)
        changed = bool(self._held_tokens > own_from)
        if changed and hasattr(sender, "slots_changed"):
            sender.slots_changed = True
        return changed


def _finalized(scheduler: Any, requests: list[Any]) -> list[Any]:
    """Has SGLang do what it does with a request that was granted pages; returns those that were not yet."""
    granted = [one for one in requests if one.disagg_kv_sender.poll() == KVPoll.WaitingForInput]
    for request in granted:
        scheduler.disagg_prefill_bootstrap_queue.finalize_bootstrap(request)
    return [one for one in requests if one not in granted]


def _is_ready(scheduler: Any, request: Any) -> bool:
    """Whether all that goes with its pages is known when SGLang puts the prompt into its cache."""
    return (
        hasattr(request.disagg_kv_sender, "sent_first")
        and not request.pending_bootstrap
        and request.inflight_middle_chunks <= 0
        and not request.return_logprob
        and not request.return_sampling_mask
        and scheduler.spec_algorithm.is_none()
    )


def _grows(cache: Any, request: Any) -> _Place | None:
    """Where the cache takes in what a request has computed: the node that it was given, and the page that follows it.
    None where something follows it there already, or nobody knows."""
    if type(cache) is not RadixCache or cache.disable:
        return None
    key = RadixKey(request.get_fill_ids(), request.extra_key, is_bigram=cache.is_eagle).page_aligned(cache.page_size)
    own = key[request.cache_protected_len :]
    if len(own) == 0:
        return id(request), None
    page = own.child_key(cache.page_size)
    return None if page in request.last_node.children else (id(request.last_node), page)
