"""Runs cover exactly the pages asked for, in order, and are as long as they can be."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer.plan import Run, check_range, runs

pages = st.lists(st.integers(0, 30), max_size=30)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=30))
def test_runs_are_the_pages_again(pairs: list[tuple[int, int]]) -> None:
    source = np.array([pair[0] for pair in pairs], np.int32)
    destination = np.array([pair[1] for pair in pairs], np.int32)

    planned = runs(source, destination)

    assert [(run.source + i, run.destination + i) for run in planned for i in range(run.pages)] == pairs
    for one, two in pairwise(planned):
        assert (one.source + one.pages, one.destination + one.pages) != (two.source, two.destination)


def test_neighbours_on_both_sides_are_one_run() -> None:
    assert runs(np.array([4, 5, 6, 9], np.int32), np.array([1, 2, 3, 4], np.int32)) == [Run(4, 1, 3), Run(9, 4, 1)]


def test_unequal_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="wanted as many destinations as sources, 2, found 1"):
        runs(np.array([1, 2], np.int32), np.array([1], np.int32))


@pytest.mark.parametrize("bad", [[-1], [3, 8], [*range(8)] * 9 + [-1], [8] + [*range(8)] * 9])
def test_a_page_outside_the_pool_is_refused(bad: list[int]) -> None:
    with pytest.raises(ValueError, match="wanted indices from 0 to 7"):
        check_range(np.array(bad, np.int32), 8)


@pytest.mark.parametrize("count", [0, 1, 8, 80])
def test_all_pages_within_the_pool_pass(count: int) -> None:
    check_range(np.arange(count, dtype=np.int32) % 8, 8)
