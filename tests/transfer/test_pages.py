"""Page ids: equal exactly for equal prefixes in equal namespaces."""

import struct

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from transfer.pages import chain_ids, namespace, root_id

ROOT = root_id(namespace("m"))
tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def test_an_id_is_the_documented_hash() -> None:
    first = xxhash.xxh3_64_intdigest(struct.pack("<Q2I", ROOT, 7, 8))
    second = xxhash.xxh3_64_intdigest(struct.pack("<Q2I", first, 9, 10))

    assert chain_ids(ROOT, [7, 8, 9, 10, 11], page_tokens=2) == [first, second]


@given(tokens, tokens, st.integers(1, 5))
def test_ids_are_equal_exactly_as_far_as_whole_pages_are(one: list[int], other: list[int], page: int) -> None:
    ids_one, ids_other = chain_ids(ROOT, one, page), chain_ids(ROOT, other, page)

    for index, (a, b) in enumerate(zip(ids_one, ids_other, strict=False)):
        assert (a == b) == (one[: (index + 1) * page] == other[: (index + 1) * page])


@given(tokens, st.integers(1, 5), st.integers(0, 8))
def test_a_chain_may_be_continued_from_any_page(prompt: list[int], page: int, at: int) -> None:
    whole = chain_ids(ROOT, prompt, page)
    at = min(at, len(whole))

    parent = whole[at - 1] if at else ROOT

    assert whole[at:] == chain_ids(parent, prompt[at * page :], page)


@pytest.mark.parametrize("other", [namespace("m", "r"), namespace("m", "", "tenant"), namespace("n")])
def test_namespaces_share_no_page(other: str) -> None:
    prompt = list(range(32))

    assert not set(chain_ids(ROOT, prompt, 4)) & set(chain_ids(root_id(other), prompt, 4))


def test_fields_of_a_namespace_cannot_run_into_each_other() -> None:
    assert namespace("a", "bc") != namespace("ab", "c")
    with pytest.raises(ValueError, match="salt: wanted text without NUL"):
        namespace("a", "b", "c\0d")


def test_a_page_of_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="page_tokens: wanted at least 1, found 0"):
        chain_ids(ROOT, [1], 0)
