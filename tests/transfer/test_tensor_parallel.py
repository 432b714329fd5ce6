"""A plan's slices, applied, make of prefill's shards exactly the shards that decode would have computed itself."""

from collections import Counter
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.plan import Pages
from transfer.tensor_parallel import ShardedLayout, Slice, destinations_of, plan, sources_of

Labels = npt.NDArray[np.int64]
"""A number for each byte, so that one in the wrong place is always seen; -1 where nothing was written."""

TP_SIZES = (1, 2, 3, 4, 6, 8, 16)


def mha(tp_size: int, total_kv_heads: int, head_bytes: int = 2, page_tokens: int = 3) -> ShardedLayout:
    return ShardedLayout("mha", tp_size, total_kv_heads, head_bytes, page_tokens)


def mla(tp_size: int, head_bytes: int = 2, page_tokens: int = 3) -> ShardedLayout:
    return ShardedLayout("mla", tp_size, 1, head_bytes, page_tokens)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[ShardedLayout, ShardedLayout]:
    heads = draw(st.sampled_from((1, 2, 3, 4, 6, 8, 12, 16, 32)))
    sizes = st.sampled_from([size for size in TP_SIZES if heads % size == 0 or size % heads == 0])
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 4)))
    if heads == 1 and draw(st.booleans()):
        return mla(draw(sizes), *shape), mla(draw(sizes), *shape)
    return mha(draw(sizes), heads, *shape), mha(draw(sizes), heads, *shape)


def shards(full: Labels, tp_size: int) -> list[Labels]:
    """Each rank's pages, flat, of `full`, shape (pages, page_tokens, heads, head_bytes), as a model's loader splits."""
    groups = min(tp_size, full.shape[2])
    return [part.reshape(-1) for part in np.split(full, groups, axis=2) for _ in range(tp_size // groups)]


def pages_of(*indices: int) -> Pages:
    return np.array(indices, np.int32)


@given(pairs())
def test_every_decode_rank_gets_its_shard_and_every_byte_once(pair: tuple[ShardedLayout, ShardedLayout]) -> None:
    prefill, decode = pair
    shape = (2, decode.page_tokens, decode.total_kv_heads, decode.head_bytes)
    full = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)
    sources = shards(full, prefill.tp_size)
    landed = [np.full(3 * decode.page_bytes, -1, np.int64) for _ in range(decode.tp_size)]
    writes = [np.zeros(3 * decode.page_bytes, np.int64) for _ in range(decode.tp_size)]

    for one in plan(prefill, decode):
        piece = np.arange(one.piece_bytes)
        read = one.source_offsets(pages_of(0, 1))[:, None] + piece
        written = one.destination_offsets(pages_of(2, 1))[:, None] + piece
        landed[one.destination_rank][written] = sources[one.source_rank][read]
        np.add.at(writes[one.destination_rank], written, 1)

    for rank, wanted in enumerate(shards(full, decode.tp_size)):
        untouched, second, first = landed[rank].reshape(3, decode.page_bytes)
        assert np.concatenate((first, second)).tolist() == wanted.tolist()
        assert (untouched == -1).all()
        assert writes[rank].reshape(3, -1).tolist() == [[times] * decode.page_bytes for times in (0, 1, 1)]


@given(pairs())
def test_prefill_ranks_send_equally_many_slices_or_one_less(pair: tuple[ShardedLayout, ShardedLayout]) -> None:
    prefill, decode = pair
    load = Counter(one.source_rank for one in plan(prefill, decode))

    sent = [load[rank] for rank in range(prefill.tp_size)]

    assert sum(sent) == sum(load.values())
    assert max(sent) - min(sent) <= 1


@given(pairs())
def test_both_sides_find_the_same_connections(pair: tuple[ShardedLayout, ShardedLayout]) -> None:
    prefill, decode = pair
    slices = plan(prefill, decode)

    sources = [(source, rank) for rank in range(decode.tp_size) for source in sources_of(slices, rank)]
    destinations = [(rank, to) for rank in range(prefill.tp_size) for to in destinations_of(slices, rank)]

    assert sorted(sources) == sorted(destinations) == sorted(set(sources))
    assert {rank for _, rank in sources} == set(range(decode.tp_size))


@given(pairs())
def test_a_page_is_one_piece_exactly_where_both_sides_hold_the_same_heads(
    pair: tuple[ShardedLayout, ShardedLayout],
) -> None:
    prefill, decode = pair
    same = prefill.local_heads == decode.local_heads

    for one in plan(prefill, decode):
        assert one.pieces == (1 if same else decode.page_tokens)
        assert one.pieces * one.source_stride_bytes == prefill.page_bytes
        assert one.pieces * one.destination_stride_bytes == decode.page_bytes


@pytest.mark.parametrize("layout", [mha(4, 8), mha(16, 8), mha(3, 6), mla(4)])
def test_equal_sizes_send_whole_pages_from_each_rank_to_its_like(layout: ShardedLayout) -> None:
    page = layout.page_bytes

    assert plan(layout, layout) == tuple(Slice(rank, rank, 1, page, 0, page, 0, page) for rank in range(layout.tp_size))


def test_two_ranks_to_four_split_the_heads() -> None:
    assert plan(mha(2, 4), mha(4, 4)) == (
        Slice(0, 0, 3, 2, 0, 4, 0, 2),
        Slice(0, 1, 3, 2, 2, 4, 0, 2),
        Slice(1, 2, 3, 2, 0, 4, 0, 2),
        Slice(1, 3, 3, 2, 2, 4, 0, 2),
    )


def test_four_ranks_to_two_join_the_heads() -> None:
    assert plan(mha(4, 4), mha(2, 4)) == (
        Slice(0, 0, 3, 2, 0, 2, 0, 4),
        Slice(1, 0, 3, 2, 0, 2, 2, 4),
        Slice(2, 1, 3, 2, 0, 2, 0, 4),
        Slice(3, 1, 3, 2, 0, 2, 2, 4),
    )


def test_sizes_that_do_not_divide_share_a_rank() -> None:
    slices = plan(mha(2, 6), mha(3, 6))

    assert [sources_of(slices, rank) for rank in range(3)] == [(0,), (0, 1), (1,)]
    assert slices[1:3] == (Slice(0, 1, 3, 2, 4, 6, 0, 4), Slice(1, 1, 3, 2, 0, 6, 2, 4))


@pytest.mark.parametrize(
    ("prefill", "decode", "sources"),
    [
        (mha(16, 8), mha(8, 8), [(0,), (2,), (4,), (6,), (8,), (10,), (12,), (14,)]),
        (mha(16, 8), mha(2, 8), [(0, 2, 4, 6), (8, 10, 12, 14)]),
        (mha(4, 8), mha(16, 8), [(rank // 4,) for rank in range(16)]),
        (mha(4, 2), mha(8, 2), [(0,), (0,), (1,), (1,), (2,), (2,), (3,), (3,)]),
        (mla(4), mla(2), [(0,), (2,)]),
        (mla(2), mla(4), [(0,), (0,), (1,), (1,)]),
        (mla(1), mla(3), [(0,), (0,), (0,)]),
    ],
)
def test_replicas_share_the_decode_ranks(
    prefill: ShardedLayout, decode: ShardedLayout, sources: list[tuple[int, ...]]
) -> None:
    slices = plan(prefill, decode)

    assert [sources_of(slices, rank) for rank in range(decode.tp_size)] == sources


def test_a_replica_that_nobody_needs_is_idle() -> None:
    slices = plan(mla(4), mla(2))

    assert [destinations_of(slices, rank) for rank in range(4)] == [(0,), (), (1,), ()]


def test_offsets_are_page_after_page_and_go_beyond_32_bits() -> None:
    one = Slice(0, 0, 2, 3, 1, 2**30, 5, 8)

    assert one.source_offsets(pages_of(0, 3)).tolist() == [1, 2**30 + 1, 6 * 2**30 + 1, 7 * 2**30 + 1]
    assert one.destination_offsets(pages_of(4, 1)).tolist() == [69, 77, 21, 29]
    assert one.source_offsets(pages_of()).tolist() == []


@pytest.mark.parametrize(
    ("prefill", "decode", "reason"),
    [
        (mla(2), mha(2, 1), "kind: wanted mla, found mha"),
        (mha(2, 8), mha(2, 4), "total_kv_heads: wanted 8, found 4"),
        (mha(2, 8, head_bytes=256), mha(4, 8, head_bytes=128), "head_bytes: wanted 256, found 128"),
        (mha(2, 8, page_tokens=16), mha(4, 8, page_tokens=64), "page_tokens: wanted 16, found 64"),
    ],
)
def test_layouts_that_cannot_meet_are_refused(prefill: ShardedLayout, decode: ShardedLayout, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}$"):
        plan(prefill, decode)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (("mha", 4, 6, 2, 3), "total_kv_heads: wanted a multiple or a divisor of tp_size 4, found 6"),
        (("mha", 6, 4, 2, 3), "total_kv_heads: wanted a multiple or a divisor of tp_size 6, found 4"),
        (("mla", 4, 128, 2, 3), "total_kv_heads: wanted 1, the latent, for mla, found 128"),
        (("mha", 0, 4, 2, 3), "tp_size: wanted at least 1, found 0"),
        (("mha", 1, 0, 2, 3), "total_kv_heads: wanted at least 1, found 0"),
        (("mha", 1, 4, 0, 3), "head_bytes: wanted at least 1, found 0"),
        (("mha", 1, 4, 2, -1), "page_tokens: wanted at least 1, found -1"),
    ],
)
def test_a_layout_that_no_model_has_is_refused_also_from_a_peer(
    values: tuple[Literal["mha", "mla"], int, int, int, int], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"^{reason}$"):
        ShardedLayout(*values)
    with pytest.raises(msgspec.ValidationError, match=f"^{reason}$"):
        msgspec.msgpack.decode(msgspec.msgpack.encode(values), type=ShardedLayout)
