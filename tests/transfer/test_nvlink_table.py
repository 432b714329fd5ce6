"""Which layers leave together: pure, and the same on every machine."""

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
    assert one.groups(1, 1 << 60) == one.groups(1, 0) == [(1, range(3))]


def test_buffers_of_a_layer_lie_beside_each_other_and_those_of_none_come_last() -> None:
    one = table((16,) * 5, ((0, 3), (1, 4)))
    assert (one.rows[:, 0] // 1000).tolist() == [0, 3, 1, 4, 2]
    assert one.groups(1, 0) == [(1, range(2)), (2, range(2, 5))]


@given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 3), st.integers(1, 300), st.integers(0, 1 << 20))
def test_every_buffer_leaves_once_not_before_its_layer_and_in_launches_that_are_worth_it(
    layers: int, a_layer: int, others: int, pages: int, launch_bytes: int
) -> None:
    buffers = tuple(tuple(number * layers + layer for number in range(a_layer)) for layer in range(layers))
    one = table((64,) * (layers * a_layer + others), buffers)
    groups = one.groups(pages, launch_bytes)
    assert [row for _, rows in groups for row in rows] == list(range(len(one.rows)))
    computed_in = {buffer: layer for layer, of_it in enumerate(buffers, start=1) for buffer in of_it}
    for until, rows in groups:
        assert all(computed_in.get(int(one.rows[row, 0]) // 1000, layers) <= until for row in rows)
    assert all(len(rows) * 64 * pages >= launch_bytes for _, rows in groups[:-1])
    assert groups[-1][0] == layers
