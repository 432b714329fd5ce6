"""Which buffers the first layers have: pure, and the same on every machine."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from transfer.layout import PoolLayout
from transfer.nvlink import _Table


def table(page_bytes: tuple[int, ...], layers: tuple[tuple[int, ...], ...] | None) -> _Table:
    layout = PoolLayout("m", "bfloat16", 16, page_bytes, (), 9)
    here, there = list(range(0, 1000 * len(page_bytes), 1000)), list(range(7, 1000 * len(page_bytes) + 7, 1000))
    return _Table.of(layout, here, there, layers)


def test_without_layers_everything_is_one() -> None:
    one = table((16, 32, 48), None)
    assert one.rows.tolist() == [[0, 7, 16], [1000, 1007, 32], [2000, 2007, 48]]
    assert (one.layers(0), one.layers(1)) == (0, 3)


def test_buffers_of_a_layer_lie_beside_each_other_and_those_of_none_come_last() -> None:
    one = table((16,) * 5, ((0, 3), (1, 4)))
    assert (one.rows[:, 0] // 1000).tolist() == [0, 3, 1, 4, 2]
    assert [one.layers(count) for count in range(3)] == [0, 2, 5]


@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 3), st.data())
def test_the_first_layers_have_their_buffers_and_no_others(
    layers: int, a_layer: int, others: int, data: st.DataObject
) -> None:
    buffers = tuple(tuple(number * layers + layer for number in range(a_layer)) for layer in range(layers))
    one = table((64,) * (layers * a_layer + others), buffers)
    assert sorted(one.rows[:, 0].tolist()) == [1000 * number for number in range(layers * a_layer + others)]
    count = data.draw(st.integers(0, layers), "layers computed")
    leaving = {int(row) // 1000 for row in one.rows[: one.layers(count), 0]}
    computed = {buffer for layer in buffers[:count] for buffer in layer}
    assert leaving == computed if count < layers else leaving >= computed
