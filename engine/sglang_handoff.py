"""SGLang's interface to a KV transfer backend, over `transfer.sender` and `transfer.receiver`.

SGLang polls each request's sender or receiver on its scheduler thread, every tick.
All of these methods only read or set a state under a short lock; connecting,
copying and waiting happen on the courier's thread. SGLang's own bootstrap server
and its sockets are not used: decode connects to prefill's hand-off port itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from sglang.srt.disaggregation.base.conn import (
    BaseKVBootstrapServer,
    BaseKVManager,
    BaseKVReceiver,
    BaseKVSender,
    KVArgs,
    KVPoll,
    KVTransferMetric,
)
from sglang.srt.disaggregation.utils import DisaggregationMode

from engine.forward_passes import PASSES, Events, ForwardPasses
from engine.sglang_landing import EventMark
from engine.sglang_layers import layers_of, why_whole
from engine.spec import WorkerSpec
from transfer.auth import ClusterKey
from transfer.bell import Bell
from transfer.computed import Computed
from transfer.cuda import CudaFailed
from transfer.deadlines import Deadlines
from transfer.ended import Ended
from transfer.layout import PoolLayout
from transfer.mark import Mark
from transfer.memory import Memory
from transfer.pool import Pool, SharedArena
from transfer.receiver import Receiver
from transfer.sender import Going, Sender
from transfer.session import ReceiverState, SenderState
from transfer.transports import make
from transfer.wire import parse_bound_host

if TYPE_CHECKING:
    from transfer.nvlink import Layers

log = logging.getLogger(__name__)

FAILED: int = KVPoll.Failed
SENDER_POLL = {
    # Every sender is offered when it is made, so its room was forgotten.
    SenderState.ABSENT: KVPoll.Failed,
    SenderState.OFFERED: KVPoll.Bootstrapping,
    SenderState.RESERVED: KVPoll.Bootstrapping,
    SenderState.GRANTED: KVPoll.WaitingForInput,
    SenderState.STREAMING: KVPoll.Transferring,
    SenderState.LANDING: KVPoll.Transferring,
    SenderState.DONE: KVPoll.Success,
    SenderState.FAILED: KVPoll.Failed,
}
RECEIVER_POLL = {
    ReceiverState.CONNECTING: KVPoll.Bootstrapping,
    ReceiverState.READY: KVPoll.WaitingForInput,
    ReceiverState.GRANTED: KVPoll.Transferring,
    ReceiverState.STREAMING: KVPoll.Transferring,
    ReceiverState.LANDING: KVPoll.Transferring,
    # Failed frees the landing pages: not before the writer has stopped, and what it wrote has landed.
    ReceiverState.STOPPING: KVPoll.Transferring,
    ReceiverState.FENCING: KVPoll.Transferring,
    ReceiverState.DONE: KVPoll.Success,
    ReceiverState.FAILED: KVPoll.Failed,
}


def _by_value(polls: Mapping[SenderState, int] | Mapping[ReceiverState, int]) -> list[int]:
    """The same, by the states' values: SGLang polls each request each tick, and Python hashes an Enum slowly."""
    table = [FAILED] * (1 + max(state.value for state in polls))
    for state, poll in polls.items():
        table[state.value] = poll
    return table


_SENDER_POLL = _by_value(SENDER_POLL)
_RECEIVER_POLL = _by_value(RECEIVER_POLL)

SIZES = ("tp_size", "pp_size", "dp_size")
"""SGLang's settings that put several ranks into one worker. Their pools would have to be joined: not yet."""


MEMORY: dict[str, Memory] = {"cpu": "DRAM", "cuda": "VRAM"}
"""Where SGLang's pages lie, by its device."""


class HandoffRefused(Exception):
    """A request that cannot be handed over at all, whatever becomes of the others."""


class HandoffFailed(Exception):
    """What SGLang shows as the reason of an aborted request."""


@dataclass(frozen=True)
class _PrefillInfo:
    """What SGLang's decode queue asks about a prefill worker before it starts a receiver."""

    dp_size: int = 1
    follow_bootstrap_room: bool = True


class _AnyPrefill(dict[str, _PrefillInfo]):
    """SGLang looks a prefill worker's topology up here and would fetch it by HTTP, on the scheduler
    thread, where it is missing. Every worker of ours has one rank, so nothing is ever missing."""

    def get(self, key: str, default: Any = None) -> _PrefillInfo:
        return _PrefillInfo()


class MainstemKVManager(BaseKVManager):  # type: ignore[misc]
    """One for each scheduler process. Holds the sender (prefill) or the receiver (decode)."""

    def __init__(
        self,
        args: KVArgs,
        disaggregation_mode: DisaggregationMode,
        server_args: Any,
        is_mla_backend: bool | None = False,
        *,
        spec: WorkerSpec,
        epoch: int,
        arena: SharedArena,
        on_end: Callable[[Ended], None],
    ) -> None:
        for size in SIZES:
            if getattr(server_args, size) != 1:
                raise ValueError(
                    f"{size}: wanted 1 with the roles prefill and decode, found {getattr(server_args, size)}"
                )
        if server_args.device not in MEMORY:
            raise ValueError(f"device: wanted {' or '.join(MEMORY)}, found {server_args.device}")
        if any(args.state_types):
            raise ValueError("model: wanted one whose KV cache is plain attention, found one with other state")
        self.kv_args = args
        self.prefill_info_table = _AnyPrefill()
        self.worker = spec.name
        self.epoch = epoch
        self.bell = Bell()
        """Rung when a hand-off has come to another state: the scheduler may sleep until then."""
        self.stale_step: Mark | None = None
        """The end of a step that may still write into pages that are free (engine.sglang_landing)."""
        self.sender: Sender | None = None
        self.receiver: Receiver | None = None
        pool, self._aux = _pools(args, server_args)
        self.bytes_per_page = pool.layout.bytes_per_page
        decodes = disaggregation_mode == DisaggregationMode.DECODE
        key = ClusterKey.read(Path(spec.key_file))
        deadlines = Deadlines(handoff_s=spec.handoff_timeout_s, silence_s=spec.silence_s)
        layers = None if decodes else _layers(spec, pool, server_args, is_mla=bool(is_mla_backend))
        self.passes = None if layers is None else _passes(pool, len(layers), apart=spec.ahead == "layers")
        """Of a prefill worker whose pages may leave before they are sent."""
        transports = make(
            spec.transports,
            pool,
            shared=arena.address_of(args.kv_data_ptrs) if decodes else None,
            tcp_lanes=spec.tcp_lanes,
            nixl_devices=spec.nixl_devices,
            stall_s=spec.silence_s,
            memory=MEMORY[server_args.device],
            layers=layers,
        )
        if decodes:
            self.receiver = Receiver(
                pool,
                self._aux,
                key,
                worker=spec.name,
                epoch=epoch,
                transports=transports,
                deadlines=deadlines,
                on_end=on_end,
                on_change=self.bell.ring,
            )
        else:
            self.sender = Sender(
                pool,
                key,
                worker=spec.name,
                epoch=epoch,
                transports=transports,
                deadlines=deadlines,
                on_change=self.bell.ring,
            )
            self.sender.listen(spec.host, spec.handoff_port)

    def ahead(self, going: Sequence[Going], computed: Computed) -> None:
        """These pages may leave as soon as they are computed."""
        assert self.sender is not None, "only a prefill worker has passes"
        self.sender.ahead(going, computed)

    @property
    def rooms(self) -> int:
        """Hand-offs that SGLang has not forgotten yet, or whose other side has spoken alone."""
        side = self.sender or self.receiver
        assert side is not None, "one of the two is made"
        return side.rooms

    def register_to_bootstrap(self) -> None:
        """Nobody to register with: the router tells decode where prefill listens."""

    def submit_prefill_recompute(self, kv_receiver: MainstemKVReceiver, payload: Any) -> None:
        """SGLang would have prefill compute a retracted request again, over HTTP. Here it fails, to be sent anew."""
        kv_receiver.abort()

    def aux_row(self, index: int) -> list[bytes]:
        """A copy of a request's row of each auxiliary buffer."""
        return [bytes(view) for view in self._aux.views([(index, 1)])]


class MainstemKVSender(BaseKVSender):  # type: ignore[misc]
    """One request on a prefill worker."""

    def __init__(
        self,
        mgr: MainstemKVManager,
        bootstrap_addr: str,
        bootstrap_room: int,
        dest_tp_ranks: Sequence[int],
        pp_rank: int,
        req_has_disagg_prefill_dp_rank: bool = False,
    ) -> None:
        assert mgr.sender is not None, "a sender needs a prefill worker's manager"
        self._manager = mgr
        self._sender = mgr.sender
        self._room = bootstrap_room
        self.slots_changed = False
        """Whether the cache has given this request pages of its own since it was last sent (engine.sglang_overlap)."""
        self.sent_first = False
        """Whether all of it was sent before the cache took it in (engine.sglang_overlap)."""
        self.leaves_ahead = False
        """Whether all that it has goes ahead in the pass that is about to begin (engine.sglang_layers)."""
        self._pages = 0
        self._sent_pages = 0
        self._aux_index = 0
        self._refused = ""
        """Why this request was never offered; then it fails, and touches nothing of another's room."""
        try:
            _, _, epoch = _bound_address(bootstrap_addr)
            if epoch not in (None, mgr.epoch):
                raise HandoffRefused(f"{mgr.worker}: restarted: wanted epoch {epoch}, found {mgr.epoch}")
            if not mgr.sender.offer(bootstrap_room):
                raise _room_taken(bootstrap_room)
        except HandoffRefused as error:
            self._refused = str(error)

    def init(self, num_kv_indices: int, aux_index: int | None = None) -> None:
        assert aux_index is not None, "SGLang gives every request a metadata row"
        self._pages, self._aux_index = num_kv_indices, aux_index
        if num_kv_indices < 0:
            held = self.pop_decode_prefix_len()
            self._sender.fail(self._room, f"prefix_tokens: wanted no more than the prompt has, found {held}")

    def pop_decode_prefix_len(self) -> int:
        return self._sender.prefix_tokens(self._room)

    def should_send_kv_chunk(self, num_pages: int, last_chunk: bool) -> bool:
        return num_pages > 0 or last_chunk

    def send(self, kv_indices: npt.NDArray[np.int32], state_indices: list[Any] | None = None, **_later: Any) -> None:
        """Queues these pages. The last chunk is not marked by SGLang: it is the one that makes the count whole."""
        if self._refused:
            return
        self._sent_pages += len(kv_indices)
        last = self._sent_pages == self._pages
        aux = self._manager.aux_row(self._aux_index) if last else None
        # SGLang leaves an event here with pages that an earlier pass may still be computing, and nowhere else.
        event = self.__dict__.pop("_early_send_wait_event", None)
        self._sender.send(self._room, kv_indices, aux, None if event is None else EventMark(event))

    def goes_ahead(self) -> bool:
        """Whether pages may leave before they are sent, now or once decode has granted some."""
        return not self._refused and self._sender.goes_ahead(self._room)

    def going(self, kv_indices: npt.NDArray[np.int32], fresh: int) -> Going:
        """What may leave of the prompt's first pages, of which a pass computes the last ones, so many."""
        return Going(self._room, kv_indices, fresh)

    def poll(self) -> int:
        return FAILED if self._refused else _SENDER_POLL[self._sender.state(self._room)._value_]

    def get_transfer_metric(self) -> KVTransferMetric:
        return KVTransferMetric(transfer_total_bytes=self._sender.sent_bytes(self._room))

    def failure_exception(self) -> None:
        """SGLang asks once, and does not always call `clear` after it: not for a request that had not begun to send."""
        reason = self._refused or self._sender.reason(self._room)
        self.clear()
        raise HandoffFailed(reason)

    def clear(self) -> None:
        if not self._refused:
            self._sender.forget(self._room)

    def abort(self) -> None:
        """Also for a request that waits to be computed, of which SGLang asks nothing any more. Of others it asks in its
        next ticks, and hears that they failed: the sender remembers that for longer."""
        if not self._refused:
            self._sender.fail(self._room, "request aborted")
            self._sender.forget(self._room)


class MainstemKVReceiver(BaseKVReceiver):  # type: ignore[misc]
    """One request on a decode worker."""

    require_staging = False

    def __init__(self, mgr: MainstemKVManager, bootstrap_addr: str, bootstrap_room: int | None = None) -> None:
        assert mgr.receiver is not None, "a receiver needs a decode worker's manager"
        self._manager = mgr
        assert bootstrap_room is not None, "SGLang refuses a request without a room before it comes here"
        self._receiver = mgr.receiver
        self._room = bootstrap_room
        self._address = bootstrap_addr
        self._refused = ""
        """Why this request was never opened; then it fails, and touches nothing of another's room."""
        self._opened = False

    @property
    def conclude_state(self) -> int | None:
        """SGLang's queue of requests that wait for room in the pool polls again only where it sees a failure here."""
        return FAILED if self.poll() == FAILED else None

    def init(self, prefill_dp_rank: int) -> None:
        if self._refused:
            return
        try:
            host, port, epoch = _bound_address(self._address)
            if not self._receiver.open(self._room, host, port, epoch):
                raise _room_taken(self._room)
            self._opened = True
        except HandoffRefused as error:
            self._refused = str(error)

    def send_metadata(
        self,
        kv_indices: npt.NDArray[np.int32],
        aux_index: int | None = None,
        state_indices: list[Any] | None = None,
        decode_prefix_len: int | None = None,
    ) -> None:
        assert aux_index is not None, "SGLang gives every request a metadata row"
        if not self._refused:
            after = self._manager.stale_step
            self._receiver.grant(self._room, kv_indices, aux_index, decode_prefix_len or 0, after)

    def poll(self) -> int:
        return FAILED if self._refused else _RECEIVER_POLL[self._receiver.state(self._room)._value_]

    def failure_exception(self) -> None:
        raise HandoffFailed(self._refused or self._receiver.reason(self._room))

    def clear(self) -> None:
        if self._opened:
            self._receiver.forget(self._room)

    def abort(self) -> None:
        if self._opened:
            self._receiver.fail(self._room, "request aborted")
        else:
            self._refused = self._refused or "request aborted"


class NoBootstrapServer(BaseKVBootstrapServer):  # type: ignore[misc]
    """SGLang starts a bootstrap server on prefill workers; the hand-off port needs none."""

    def __init__(self, host: str, port: int) -> None:
        pass


def _bound_address(address: str) -> tuple[str, int, int | None]:
    """Host, port and epoch of what SGLang made of a request's bootstrap host and port. Raises HandoffRefused."""
    bound, _, port = address.rpartition(":")
    try:
        host, epoch = parse_bound_host(bound)
        return host.strip("[]"), int(port), epoch
    except ValueError:
        raise HandoffRefused(f"bootstrap_host: wanted HOST or EPOCH@HOST, found {bound[:200]!r}") from None


def _room_taken(room: int) -> HandoffRefused:
    return HandoffRefused(f"bootstrap_room: wanted one of its own for each request, found {room} in use")


def _layers(spec: WorkerSpec, pool: Pool, server_args: Any, *, is_mla: bool) -> Layers | None:
    """What lets pages leave before they are sent; None where they do not."""
    if MEMORY[server_args.device] != "VRAM" or "nvlink" not in spec.transports or spec.ahead == "never":
        return None
    if reason := why_whole(server_args):
        log.info("pages leave when they are sent, not before: %s", reason)
        return None
    return layers_of(len(pool.buffers), is_mla=is_mla)


@dataclass(frozen=True)
class _Reached:
    """An event of CUDA's (transfer.mark.Mark), which a pass that comes PASSES later may record again."""

    device: Any
    event: Any

    def reached(self) -> bool:
        try:
            return bool(self.device.reached(self.event))
        except CudaFailed:
            # Whoever goes on finds that too, and says so.
            return True


def _passes(pool: Pool, layers: int, *, apart: bool) -> ForwardPasses:
    """apart: whether all of their layers but the last leave while that one is computed"""
    # CUDA's bindings, and a driver: only where there is a GPU.
    from transfer.cuda import Device

    device = Device.of(pool.buffers[0].ctypes.data)
    sets = [Events(device.event(), device.event(), device.event()) for _ in range(PASSES)]
    return ForwardPasses(
        layers,
        sets,
        device.record,
        lambda: torch.cuda.current_stream().cuda_stream,
        lambda event: _Reached(device, event),
        apart=apart,
    )


def _pools(args: KVArgs, server_args: Any) -> tuple[Pool, Pool]:
    """The KV pool and the auxiliary rows, as pools over SGLang's own memory."""
    layout = PoolLayout(
        model=server_args.served_model_name,
        dtype=str(server_args.kv_cache_dtype if server_args.kv_cache_dtype != "auto" else server_args.dtype),
        page_tokens=args.page_size,
        page_bytes=tuple(args.kv_item_lens),
        aux_row_bytes=tuple(args.aux_item_lens),
        pages=min(length // item for length, item in zip(args.kv_data_lens, args.kv_item_lens, strict=True)),
    )
    aux = PoolLayout(
        model="",
        dtype="",
        page_tokens=1,
        page_bytes=tuple(args.aux_item_lens),
        aux_row_bytes=(),
        pages=min(length // item for length, item in zip(args.aux_data_lens, args.aux_item_lens, strict=True)),
    )
    return Pool.at(layout, args.kv_data_ptrs), Pool.at(aux, args.aux_data_ptrs)
