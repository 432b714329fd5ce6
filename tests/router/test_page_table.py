"""The table from ids to slots against a dictionary, where many ids want the same places."""

from __future__ import annotations

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from router.page_table import NONE, SMALLEST, PageTable

# Nearly all want one of the last places, so that they go on from the table's beginning, also after it has grown.
pages = st.one_of(
    st.tuples(st.integers(0, 40), st.integers(1, 4)).map(lambda drawn: (drawn[0] + 1) * 2**20 - drawn[1]),
    st.integers(0, 2**64 - 1),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(pages, min_size=1, max_size=60), st.booleans()), max_size=12))
def test_it_finds_what_a_dictionary_finds(steps: list[tuple[list[int], bool]]) -> None:
    ids = array("Q")
    table, slots = PageTable(ids), dict[int, int]()
    for some, added in steps:
        if added:
            new = [page for page in dict.fromkeys(some) if page not in slots]
            slots |= dict(zip(new, range(len(ids), len(ids) + len(new)), strict=True))
            ids.extend(new)
            table.add([slots[page] for page in new])
        else:
            table.remove([slots.pop(page) for page in dict.fromkeys(some) if page in slots])
        assert len(table) == len(slots)
        assert all(table.find(page) == slots.get(page, NONE) for page in {*some, *slots})
        assert sum(entry != NONE for entry in table._entries) == len(slots)


def test_a_table_that_grows_with_its_end_full_goes_on_from_its_beginning() -> None:
    last = [number * 2**20 - 1 for number in range(1, SMALLEST + 1)]  # all want the last place
    table = PageTable(array("Q", last))

    table.add(range(SMALLEST))

    assert [table.find(page) for page in last] == list(range(SMALLEST))
    assert table.find(2**20) == NONE
