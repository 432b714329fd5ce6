"""What SGLang loads in each of its processes (entry point `sglang.srt.plugins`).

It registers hooks and nothing else; they act only in a worker that Mainstem started
(MAINSTEM_WORKER_SPEC is set), so having Mainstem installed changes no other SGLang.

    transfer backend "mainstem"    -> engine.sglang_handoff
    KV pools on a CPU              -> in memory that a peer can map
    SIGTERM                        -> the worker ends at once, and says goodbye
    radix tree's stores, removals  -> engine.page_events -> engine.outbox -> agent
    aborted before it is sent      -> its room is let go, and decode is told
    decode's own cached prefix     -> not counted as prefill that was saved, sound where the pool runs full
    how far a forward pass is      -> engine.sglang_layers
    a pass while the next one runs -> engine.sglang_overlap
    a first token                  -> engine.sglang_first_token, its text engine.sglang_detokenize
    one rank asks itself           -> engine.sglang_polls
    a step behind freed pages      -> engine.sglang_landing
    nothing to compute             -> engine.sglang_idle
    a beginning for many at once   -> engine.sglang_siblings
    a request's JSON               -> engine.sglang_json
    no CUDA                        -> engine.sglang_cpu
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from sglang.srt.disaggregation import utils as disaggregation
from sglang.srt.disaggregation.base import KVArgs
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_parallel
from sglang.srt.server_args import DISAGG_TRANSFER_BACKEND_CHOICES, add_disagg_transfer_backend_choices

from engine import sglang_cpu, sglang_detokenize, sglang_json, sglang_polls, sglang_token_ids
from engine.outbox import Outbox
from engine.page_events import PageEvents
from engine.sglang_first_token import FirstTokenHooks
from engine.sglang_idle import IdleHook
from engine.sglang_landing import LandingHook
from engine.sglang_layers import LayerHooks
from engine.sglang_overlap import OverlapHooks
from engine.sglang_siblings import SiblingHook
from engine.sglang_slots import SlotReader
from engine.spec import EPOCH_VARIABLE, SPEC_VARIABLE, WorkerSpec, page_socket
from transfer.pool import SharedArena
from transfer.wire import Pools

BACKEND = "mainstem"


def register() -> None:
    """SGLang calls this once in each process, before it reads its arguments."""
    _add_backend()
    hooks = WorkerHooks()
    events = "sglang.srt.mem_cache.events.KVCacheEventMixin."
    pool = "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool."
    signals = "sglang.srt.managers.tokenizer_manager.SignalHandler."
    HookRegistry.register("sglang.srt.disaggregation.utils.get_kv_class", hooks.kv_class, HookType.AROUND)
    HookRegistry.register(signals + "sigterm_handler", hooks.sigterm, HookType.AROUND)
    HookRegistry.register(pool + "_create_buffers_normal", hooks.create_buffers, HookType.AROUND)
    decode = "sglang.srt.disaggregation.decode."
    transferring, waiting = decode + "DecodeTransferQueue.", decode + "DecodePreallocQueue."
    HookRegistry.register(transferring + "_commit_transfer_to_req", hooks.committed, HookType.AFTER)
    HookRegistry.register(waiting + "resume_retracted_reqs", hooks.resumed, HookType.AFTER)
    scheduler = "sglang.srt.managers.scheduler.Scheduler."
    HookRegistry.register(scheduler + "process_input_requests", hooks.moved, HookType.AFTER)
    HookRegistry.register(scheduler + "abort_request", hooks.aborted, HookType.AROUND)
    HookRegistry.register(events + "_record_store_event", hooks.stored, HookType.AROUND)
    HookRegistry.register(events + "_record_remove_event", hooks.removed, HookType.AROUND)
    HookRegistry.register(events + "_record_all_cleared_event", hooks.cleared, HookType.AROUND)
    reader = SlotReader()
    LayerHooks(reader).register()
    first_tokens = FirstTokenHooks()
    first_tokens.register()
    OverlapHooks(reader, first_tokens.computed).register()
    LandingHook().register()
    IdleHook().register()
    SiblingHook().register()
    sglang_token_ids.register()
    sglang_detokenize.register()
    sglang_json.register()
    sglang_polls.apply()
    sglang_cpu.apply()


class WorkerHooks:
    """The hooks, and what they share in one process: the worker's spec, its arena, its way to the agent."""

    def __init__(self) -> None:
        self._arena = SharedArena()

    @functools.cached_property
    def _spec(self) -> WorkerSpec | None:
        """None outside a worker of ours. Read late: a process that is forked gets it after the plug-in was loaded."""
        path = os.environ.get(SPEC_VARIABLE)
        return WorkerSpec.read(Path(path)) if path else None

    @functools.cached_property
    def _outbox(self) -> Outbox:
        assert self._spec is not None, "only a worker of ours has an agent to tell"
        return Outbox(page_socket(self._spec))

    @functools.cached_property
    def _page_events(self) -> PageEvents | None:
        """None where this process is not the one rank whose tree is told of."""
        parallel = get_parallel()
        if self._spec is None or parallel.attn_tp_rank or parallel.attn_cp_rank:
            return None
        return PageEvents(self._spec.served_model, "", self._outbox.put)

    def kv_class(self, original: Any, transfer_backend: Any, class_type: Any) -> Any:
        """SGLang asks for the classes of a transfer backend one by one."""
        if transfer_backend.value != BACKEND:
            return original(transfer_backend, class_type)
        if self._spec is None:
            raise RuntimeError(f"{SPEC_VARIABLE}: wanted a worker spec, found none: start workers with `mainstem up`")
        from engine import sglang_handoff

        kinds = disaggregation.KVClassType
        return {
            kinds.KVARGS: KVArgs,
            kinds.MANAGER: self._make_manager,
            kinds.SENDER: sglang_handoff.MainstemKVSender,
            kinds.RECEIVER: sglang_handoff.MainstemKVReceiver,
            kinds.BOOTSTRAP_SERVER: sglang_handoff.NoBootstrapServer,
        }[class_type]

    def _make_manager(self, *arguments: Any, **more: Any) -> Any:
        """As SGLang makes one, in its scheduler process. Only there an outbox may be: its thread survives no fork."""
        from engine.sglang_handoff import MainstemKVManager

        assert self._spec is not None, "checked where SGLang asked for this"
        epoch = int(os.environ[EPOCH_VARIABLE])
        on_end = self._outbox.ended
        return MainstemKVManager(*arguments, **more, spec=self._spec, epoch=epoch, arena=self._arena, on_end=on_end)

    def sigterm(self, original: Any, handler: Any, *arguments: Any) -> None:
        """Ends the worker's HTTP process at once, through its `finally` clauses; its children end with it.

        SGLang would look every five seconds whether it was told to stop, and then wait for requests without a bound.
        """
        if self._spec is None:
            original(handler, *arguments)
            return
        if handler.tokenizer_manager._subprocess_watchdog is not None:
            handler.tokenizer_manager._subprocess_watchdog.stop()
        raise SystemExit(0)

    def create_buffers(self, original: Any, pool: Any) -> None:
        """K and V of every layer, in memory that a peer on this host can map, where SGLang would take private one."""
        if self._spec is None or torch.device(pool.device).type != "cpu" or pool.kv_cache_layout != "nhd":
            original(pool)
            return
        k_shape, v_shape = pool._kv_buffer_shapes()
        shapes = [k_shape] * pool.layer_num + [v_shape] * pool.layer_num
        sizes = [_size_bytes(shape, pool.store_dtype) for shape in shapes]
        tensors = [
            torch.frombuffer(memory, dtype=pool.store_dtype).view(shape)
            for memory, shape in zip(self._arena.allocate(sizes), shapes, strict=True)
        ]
        pool.k_buffer, pool.v_buffer = tensors[: pool.layer_num], tensors[pool.layer_num :]

    def committed(self, _nothing: None, _queue: Any, decode_request: Any) -> None:
        """Keeps `cached_tokens` what prefill's cache saved, as it came with the pages.

        Where decode's own cache held more of the prompt, SGLang would add that: what it saved is a part of the
        hand-off, no compute, and it is counted there. The whole prompt is noted as accounted for instead.
        """
        request = decode_request.req
        if self._spec is not None:
            request.already_computed = len(request.origin_input_ids)

    def resumed(self, requests: list[Any], queue: Any, *_later: Any, **_more: Any) -> None:
        """Requests that lost their pages to others, and have all of them again, fresh ones, none out of the cache.

        SGLang 0.5.16 would match them against the decode worker's prefix cache then. It would count tokens as the
        cache's that lie in the request's own pages, which nobody frees any more, and take a lock off that it never
        set: the next check of the pool ends the worker. A node to start from tells it that there is no match.
        """
        if self._spec is not None and queue.scheduler.server_args.disaggregation_decode_enable_radix_cache:
            for request in requests:
                request.last_node = queue.tree_cache.root_node

    def moved(self, _nothing: None, scheduler: Any, *_requests: Any) -> None:
        """The scheduler's loop has come round: it neither hangs nor is it stopped."""
        if self._spec is not None:
            self._outbox.moved(lambda: _pools_of(scheduler))

    def aborted(self, original: Any, scheduler: Any, abort: Any) -> None:
        """Also of a request that waits to be computed, or is being computed before decode has pages for it, the room is
        let go.

        SGLang 0.5.16 takes the first out of its queue, and never asks its sender for anything again: decode would keep
        its pages until the hand-off's deadline, and the sender its room for ever. The second it marks, and never looks
        at the mark: it would keep its pages for a grant that does not come.
        """
        waiting = list(scheduler.waiting_queue)
        original(scheduler, abort)
        if self._spec is None or scheduler.disagg_prefill_bootstrap_queue is None:
            return
        left = {id(request) for request in scheduler.waiting_queue}
        gone = [request for request in waiting if id(request) not in left]
        for batch in (scheduler.running_batch, scheduler.last_batch):
            for request in batch.reqs if batch else ():
                # SGLang sees to one that has chunks to come.
                if request.pending_bootstrap and request.to_finish and request is not scheduler.chunked_req:
                    gone.append(request)
        for request in gone:
            request.disagg_kv_sender.abort()

    def stored(self, original: Any, cache: Any, node: Any, medium: str | None = None) -> None:
        if self._page_events is None:
            original(cache, node, medium)
        else:
            self._page_events.stored(node, cache.page_size, medium)

    def removed(self, original: Any, cache: Any, node: Any, medium: str | None = None) -> None:
        if self._page_events is None:
            original(cache, node, medium)
        else:
            self._page_events.removed(node, cache.page_size, medium)

    def cleared(self, original: Any, cache: Any) -> None:
        if self._page_events is None:
            original(cache)
        else:
            self._page_events.cleared()


def _pools_of(scheduler: Any) -> Pools:
    """What a scheduler of SGLang's has to give now."""
    rows = getattr(scheduler, "req_to_metadata_buffer_idx_allocator", None)
    queue = scheduler.disagg_prefill_bootstrap_queue or scheduler.disagg_decode_prealloc_queue
    return Pools(
        free_tokens=scheduler.token_to_kv_pool_allocator.available_size(),
        free_requests=scheduler.req_to_token_pool.available_size(),
        free_rows=0 if rows is None else rows.available_size(),
        rooms=0 if queue is None else queue.kv_manager.rooms,
    )


def _size_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    size: int = dtype.itemsize
    for dimension in shape:
        size *= dimension
    return size


def _add_backend() -> None:
    """SGLang has no registry for transfer backends: an enum and a list of choices, which get one more member."""
    if BACKEND not in DISAGG_TRANSFER_BACKEND_CHOICES:
        add_disagg_transfer_backend_choices([BACKEND])
    backends: Any = disaggregation.TransferBackend
    if BACKEND in backends._value2member_map_:
        return
    member = object.__new__(backends)
    member._name_, member._value_ = BACKEND.upper(), BACKEND
    member._sort_order_ = len(backends._member_names_)
    backends._member_map_[member._name_] = member
    backends._value2member_map_[BACKEND] = member
    backends._member_names_.append(member._name_)
    type.__setattr__(backends, member._name_, member)
