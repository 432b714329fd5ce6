"""Prefill's forward passes say when they are computed: pages leave without waiting for the CPU (`Sender.ahead`).

    Scheduler.run_batch                 a pass begins: which pages its requests have when it is over;
                                        at its end its stream has all of it
    AttentionBackend.forward, layer n   those before n are in the pool, as far as the stream is concerned: where layers
                                        leave before the pass is over, they may now; and it soon is over
    Scheduler.process_disagg_prefill_inflight_queue
                                        what was computed before this pass is sent, and now this one's pages may leave

A route copies in order: pages of a pass that is yet to be computed must not go before those of the one before it are
confirmed. So with SGLang's overlap, which begins a pass before it looks at the result of the last one, they wait for
that.
Which pages they are is known to the GPU first; to ask it would be to wait for the pass before, so it is told to say
(`SlotReader`), once the pass is in its stream, as an idle GPU waits for that; by the time that the pages may leave it
has.

For a model that does not come by that way, or runs in one CUDA graph, all layers are computed at the end of the pass.
Then those leave from there that decode had granted when the pass was launched: still before the CPU has heard of it.
Why only behind run_batch: `Computed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from engine.forward_passes import ForwardPasses
from engine.sglang_slots import SlotReader, SlotsRead
from transfer.computed import Computed


@dataclass(frozen=True)
class _Going:
    """One request of a pass whose pages are to go ahead."""

    sender: Any
    slots: torch.Tensor
    """Of its tokens, in SGLang's table."""
    fresh: int
    """How many of its pages the pass fills, the last ones."""


class LayerHooks:
    """Act where a worker's KV manager has passes to record, which a prefill worker on a GPU has."""

    def __init__(self, reader: SlotReader) -> None:
        self._reader = reader
        self._passes: ForwardPasses | None = None
        """Of the process, while one of them runs of which anything leaves ahead."""
        self._manager: Any = None
        self._going: list[tuple[_Going, SlotsRead]] = []
        """Of the pass that was put into its stream last."""
        self._computed: Computed | None = None
        """When that one is, where its pages are still to leave."""

    def register(self) -> None:
        scheduler = "sglang.srt.managers.scheduler.Scheduler."
        attention = "sglang.srt.layers.attention.base_attn_backend.AttentionBackend."
        HookRegistry.register(scheduler + "run_batch", self.run_batch, HookType.AROUND)
        HookRegistry.register(scheduler + "process_disagg_prefill_inflight_queue", self.others_sent, HookType.AFTER)
        HookRegistry.register(attention + "forward", self.attention, HookType.BEFORE)

    def run_batch(self, original: Any, scheduler: Any, batch: Any, *arguments: Any, **named: Any) -> Any:
        manager = _manager_of(scheduler)
        if manager is None or not batch.forward_mode.is_extend():
            return original(scheduler, batch, *arguments, **named)
        allocator, table = scheduler.token_to_kv_pool_allocator, scheduler.req_to_token_pool.req_to_token
        page_tokens = allocator.page_size
        going = _about_to_run(batch, page_tokens, table, cached=not _loads_layers(allocator.get_kvcache()))
        self._manager, self._going = manager, []
        if not going:
            return original(scheduler, batch, *arguments, **named)
        written, passes = self._reader.written(table), manager.passes
        passes.begin(stream_of(scheduler).cuda_stream)
        self._passes = passes
        try:
            result = original(scheduler, batch, *arguments, **named)
        finally:
            self._passes = None
        self._computed = passes.end()
        self._going = [(one, self._reader.read(one.slots, page_tokens, written)) for one in going]
        if not scheduler.enable_overlap:
            self._leave()
        return result

    def others_sent(self, _done: Any, _scheduler: Any, *_arguments: Any, **_named: Any) -> None:
        self._leave()

    def attention(self, *arguments: Any, **named: Any) -> None:
        if self._passes is not None:
            self._passes.reaches((named["layer"] if "layer" in named else arguments[4]).layer_id)

    def _leave(self) -> None:
        computed, self._computed = self._computed, None
        if computed is not None:
            self._manager.ahead([one.sender.going(slots.pages(), one.fresh) for one, slots in self._going], computed)


def _about_to_run(batch: Any, page_tokens: int, table: torch.Tensor, *, cached: bool) -> list[_Going]:
    """The requests of the pass whose pages go ahead: those that are full when it is over, and a prompt's last one.

    Also a request that decode has not granted pages yet: it may have when the pass is nearly over.

    cached  whether the pool has what the cache had of a prompt before the pass begins
    """
    going = []
    for request in batch.reqs:
        # A request of SGLang's own, to warm up or to ask for health, has a sender of SGLang's own.
        sender = request.disagg_kv_sender
        if not hasattr(sender, "leaves_ahead"):
            continue
        sender.leaves_ahead = sender.goes_ahead()
        if not sender.leaves_ahead:
            continue
        end = request.extend_range.end
        if end < len(request.origin_input_ids):
            end -= end % page_tokens
        pages = -(-end // page_tokens)
        there = request.extend_range.start // page_tokens if cached else 0
        fresh = max(0, pages - there)
        going.append(_Going(sender, table[request.req_pool_idx, :end], fresh))
    return going


def _loads_layers(pool: Any) -> bool:
    """Whether a cache beyond the GPU fills this pool while a pass runs, each layer before it is read: SGLang's
    hierarchical cache and LMCache do. To SGLang such slots are cached when the pass begins."""
    return pool.layer_transfer_counter is not None


def layers_of(buffers: int, *, is_mla: bool) -> tuple[tuple[int, ...], ...]:
    """Which buffers of SGLang's KV pool are whose: K of all layers and then V of all; with MLA one a layer."""
    layers = buffers if is_mla else buffers // 2
    return tuple((layer,) if is_mla else (layer, layers + layer) for layer in range(layers))


def why_whole(server_args: Any) -> str:
    """Why this worker's passes do not fill their layers one after the other, each once; empty where they do."""
    for field in ("enable_two_batch_overlap", "enable_pdmux", "speculative_algorithm"):
        if getattr(server_args, field, None):
            return f"{field} is set"
    return ""


def _manager_of(scheduler: Any) -> Any:
    """The KV manager, where it has passes to record."""
    queue = scheduler.disagg_prefill_bootstrap_queue
    manager = None if queue is None else queue.kv_manager
    return manager if getattr(manager, "passes", None) is not None else None


def stream_of(scheduler: Any) -> Any:
    """The one in which a pass is computed."""
    return scheduler.forward_stream if scheduler.enable_overlap else torch.cuda.current_stream()
