"""Which bytes of a page go from which prefill rank to which decode rank, where KV heads are split over ranks.

A rank's page of one buffer (K or V of a layer) has shape (page_tokens, local_heads, head_bytes). With more ranks
than heads each head is on `tp_size / total_kv_heads` neighbouring ranks. MLA is the same with one head: the latent.

    4 heads, prefill tp 2 -> decode tp 4           4 heads, prefill tp 8 -> decode tp 2

    prefill 0 | h0 h1 |  ── h0 ──> 0 | h0 |        prefill 0 | h0 |  ── h0 ──> 0 | h0 h1 |
                         ── h1 ──> 1 | h1 |                1 | h0 |  idle
            1 | h2 h3 |  ── h2 ──> 2 | h2 |                2 | h1 |  ── h1 ──> 0
                         ── h3 ──> 3 | h3 |                3 | h1 |  idle        …

Every byte of a decode rank's page has one writer, so it waits for one answer from each of its sources. One prefill
rank sends a decode rank at most one slice. A prefill rank without a destination has nothing to wait for.

SGLang 0.5.16 sets limits of its own. Models refuse at load time head counts that do not divide by the tensor-parallel
size, or the reverse; so does `ShardedLayout`. Its transfer backends round down where one size is no multiple of the
other, without a refusal: planned here, tp 2 -> 3 is exact. They refuse different sizes, in the middle of a transfer,
where a model that is not MLA has sliding-window or sparse-index state beside its KV; such state is not planned here.
Pages must lie token by token: its head-major, page-major and vectorized pools do not fit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from transfer.plan import Pages

Offsets = npt.NDArray[np.int64]
"""Bytes from a buffer's start, one-dimensional."""


class ShardedLayout(msgspec.Struct, frozen=True, array_like=True):
    """How one buffer's pages are split over a worker's ranks. K and V may differ in `head_bytes`.

    Raises ValueError, also when decoded from a message, where no model can be split so.
    """

    kind: Literal["mha", "mla"]
    """mha: heads are split, also with grouped queries. mla: every rank holds the whole latent."""
    tp_size: int
    """Ranks that share one request's attention (SGLang's attn_tp_size)."""
    total_kv_heads: int
    """Over all ranks, each counted once; 1 for mla, whatever the model's configuration says."""
    head_bytes: int
    """One token's K or V in one head; for mla one token's latent."""
    page_tokens: int

    def __post_init__(self) -> None:
        for name in ("tp_size", "total_kv_heads", "head_bytes", "page_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted at least 1, found {getattr(self, name)}")
        if self.kind == "mla" and self.total_kv_heads != 1:
            raise ValueError(f"total_kv_heads: wanted 1, the latent, for mla, found {self.total_kv_heads}")
        if self.total_kv_heads % self.tp_size and self.tp_size % self.total_kv_heads:
            raise ValueError(
                f"total_kv_heads: wanted a multiple or a divisor of tp_size {self.tp_size}, found {self.total_kv_heads}"
            )

    @property
    def local_heads(self) -> int:
        """Heads on each rank."""
        return max(1, self.total_kv_heads // self.tp_size)

    @property
    def replicas(self) -> int:
        """Ranks, neighbours, that hold the same heads."""
        return max(1, self.tp_size // self.total_kv_heads)

    @property
    def token_bytes(self) -> int:
        """One token in one rank's page."""
        return self.local_heads * self.head_bytes

    @property
    def page_bytes(self) -> int:
        """One page of one rank: what the pool's layout must say, too."""
        return self.page_tokens * self.token_bytes

    def mismatch(self, other: ShardedLayout) -> str | None:
        """The first difference that no plan can bridge, spelled out; None where there is a plan."""
        for name in ("kind", "total_kv_heads", "head_bytes", "page_tokens"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name}: wanted {mine}, found {theirs}"
        return None


class Slice(NamedTuple):
    """What one prefill rank writes into each page of one decode rank: `pieces` times `piece_bytes`.

    Piece i starts at offset + i * stride in a page, on either side. It is one piece for each token, or
    one for the page where pages of both sides are the same bytes. pieces * stride is a page.
    """

    source_rank: int
    destination_rank: int
    pieces: int
    piece_bytes: int
    source_offset_bytes: int
    source_stride_bytes: int
    destination_offset_bytes: int
    destination_stride_bytes: int

    def source_offsets(self, pages: Pages) -> Offsets:
        """Where each piece of these pages starts in the source's buffer, page after page; len(pages) * pieces."""
        return _offsets(pages, self.pieces, self.source_offset_bytes, self.source_stride_bytes)

    def destination_offsets(self, pages: Pages) -> Offsets:
        """The same in the destination's buffer."""
        return _offsets(pages, self.pieces, self.destination_offset_bytes, self.destination_stride_bytes)


def plan(prefill: ShardedLayout, decode: ShardedLayout) -> tuple[Slice, ...]:
    """Slices that fill every decode rank's page once, in the order of decode ranks, then of heads.

    Where prefill ranks hold the same head, the decode ranks that need it are spread evenly over them.

    Raises ValueError with `mismatch`'s text.
    """
    difference = prefill.mismatch(decode)
    if difference is not None:
        raise ValueError(difference)
    slices = []
    for rank in range(decode.tp_size):
        shard, replica = divmod(rank, decode.replicas)
        # Either a prefill rank has no replica, or it holds one head and `decode.replicas` ranks need that head.
        prefill_replica = replica * prefill.replicas // decode.replicas
        head, end = shard * decode.local_heads, (shard + 1) * decode.local_heads
        while head < end:
            prefill_shard, prefill_head = divmod(head, prefill.local_heads)
            heads = min(prefill.local_heads - prefill_head, end - head)
            one = Slice(
                source_rank=prefill_shard * prefill.replicas + prefill_replica,
                destination_rank=rank,
                pieces=decode.page_tokens,
                piece_bytes=heads * decode.head_bytes,
                source_offset_bytes=prefill_head * prefill.head_bytes,
                source_stride_bytes=prefill.token_bytes,
                destination_offset_bytes=(head - shard * decode.local_heads) * decode.head_bytes,
                destination_stride_bytes=decode.token_bytes,
            )
            slices.append(_joined(one))
            head += heads
    return tuple(slices)


def sources_of(slices: Iterable[Slice], decode_rank: int) -> tuple[int, ...]:
    """The prefill ranks that this decode rank connects to; it waits for one answer from each."""
    return tuple(one.source_rank for one in slices if one.destination_rank == decode_rank)


def destinations_of(slices: Iterable[Slice], prefill_rank: int) -> tuple[int, ...]:
    """The decode ranks that this prefill rank writes to; none where another rank with the same heads does it."""
    return tuple(one.destination_rank for one in slices if one.source_rank == prefill_rank)


def _joined(one: Slice) -> Slice:
    """One piece where nothing lies between the pieces on either side."""
    if not one.piece_bytes == one.source_stride_bytes == one.destination_stride_bytes:
        return one
    page_bytes = one.pieces * one.piece_bytes
    return one._replace(
        pieces=1, piece_bytes=page_bytes, source_stride_bytes=page_bytes, destination_stride_bytes=page_bytes
    )


def _offsets(pages: Pages, pieces: int, offset_bytes: int, stride_bytes: int) -> Offsets:
    starts = pages.astype(np.int64)[:, None] * (pieces * stride_bytes)
    return (starts + np.arange(pieces, dtype=np.int64) * stride_bytes + offset_bytes).ravel()
