"""Prefill's forward passes say how far they are, so that pages leave layer by layer (`transfer.sender.Sender.ahead`).

    Scheduler.run_batch                         a pass begins; at its end all of its layers are counted
    Scheduler.maybe_send_cached_prefix_chunk    just before it, once a request: its new pages may go ahead
    AttentionBackend.forward, layer n           the layers before n are in the pool, as far as the stream is concerned

A model that does not come by that way, or runs in one CUDA graph, counts all its layers at the end of its pass. Then
pages leave at once from there: still before the CPU has heard of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.disaggregation.utils import kv_to_page_indices
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

if TYPE_CHECKING:
    from transfer.layer_count import LayerCount

AHEAD_BYTES = 64 << 20
"""A request that has fewer to send is sent when its pass is over: to ask a GPU for its pages costs the scheduler time,
and the link brings them there in no time."""


class ForwardPasses:
    """Counts the layers of one process's forward passes. For the scheduler's thread."""

    def __init__(self, count: LayerCount, layers: int) -> None:
        self._count = count
        self._layers = layers
        self._base = 0
        self._stream: Any = None
        """None between two passes."""
        self._said = 0

    @property
    def base(self) -> int | None:
        """The count with which the pass under way began; None between two."""
        return None if self._stream is None else self._base

    def begin(self, stream: Any) -> None:
        """A pass runs on this stream of torch's."""
        self._stream, self._said = stream, 0

    def reaches(self, layer: int) -> None:
        """The layers before this one are in the pool once the current stream comes here.

        A layer that writes on a stream of its own says nothing, and neither does one that comes again.
        """
        if self._stream is None or not self._said < layer < self._layers:
            return
        if torch.cuda.current_stream().cuda_stream == self._stream.cuda_stream:
            self._said = layer
            self._count.tell(self._stream.cuda_stream, self._base + layer)

    def end(self) -> None:
        stream, self._stream = self._stream, None
        self._base += self._layers
        self._count.tell(stream.cuda_stream, self._base)


class LayerHooks:
    """Act where a worker's KV manager has passes to count, which a prefill worker on a GPU has."""

    def __init__(self) -> None:
        self._passes: ForwardPasses | None = None
        """Of the process, while one of them runs."""

    def register(self) -> None:
        scheduler = "sglang.srt.managers.scheduler.Scheduler."
        attention = "sglang.srt.layers.attention.base_attn_backend.AttentionBackend."
        HookRegistry.register(scheduler + "run_batch", self.run_batch, HookType.AROUND)
        HookRegistry.register(scheduler + "maybe_send_cached_prefix_chunk", self.about_to_run, HookType.AFTER)
        HookRegistry.register(attention + "forward", self.attention, HookType.BEFORE)

    def run_batch(self, original: Any, scheduler: Any, batch: Any, *arguments: Any, **named: Any) -> Any:
        passes = _passes_of(scheduler)
        if passes is None or not batch.forward_mode.is_extend():
            return original(scheduler, batch, *arguments, **named)
        passes.begin(scheduler.forward_stream if scheduler.enable_overlap else torch.cuda.current_stream())
        self._passes = passes
        try:
            return original(scheduler, batch, *arguments, **named)
        finally:
            self._passes = None
            passes.end()

    def about_to_run(self, _nothing: None, scheduler: Any, request: Any) -> None:
        """Lets the pages that this pass fills go ahead; of a page that it does not fill, only a prompt's last one."""
        if self._passes is None or self._passes.base is None or request.pending_bootstrap:
            return
        page_tokens = scheduler.token_to_kv_pool_allocator.page_size
        start, end = request.extend_range.start, request.extend_range.end
        start -= start % page_tokens
        if end < len(request.origin_input_ids):
            end -= end % page_tokens
        sender = request.disagg_kv_sender
        if sender.goes_ahead((end - start) // page_tokens, AHEAD_BYTES):
            slots = scheduler.req_to_token_pool.req_to_token[request.req_pool_idx, start:end]
            sender.ahead(start, kv_to_page_indices(slots, page_tokens), self._passes.base)

    def attention(self, *arguments: Any, **named: Any) -> None:
        if self._passes is not None:
            self._passes.reaches((named["layer"] if "layer" in named else arguments[4]).layer_id)


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


def _passes_of(scheduler: Any) -> ForwardPasses | None:
    queue = scheduler.disagg_prefill_bootstrap_queue
    return None if queue is None else getattr(queue.kv_manager, "passes", None)
