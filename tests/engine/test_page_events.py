"""Pages of the radix tree get the ids that a router computes from the prompt, also after the tree split nodes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.page_events import PageEvents
from transfer.pages import chain_ids, namespace, root_id
from transfer.wire import PageEvent, Removed, Stored, Tier

PAGE = 2


@dataclass
class Key:
    tokens: Sequence[int]
    extra_key: str | None = None
    is_bigram: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    def raw_token_ids(self) -> Sequence[int]:
        return array("q", self.tokens)


@dataclass
class Node:
    """A node of a radix tree, with the attributes that SGLang's have. tests/cluster does this with the real tree."""

    key: Key
    parent: Node | None = None
    mainstem_ids: list[int] | None = field(default=None)

    def split(self, at: int) -> Node:
        front = Node(Key(self.key.tokens[:at], self.key.extra_key), self.parent)
        self.key = Key(self.key.tokens[at:], self.key.extra_key)
        self.parent = front
        return front


def recorder() -> tuple[PageEvents, list[PageEvent]]:
    published: list[PageEvent] = []
    return PageEvents("m", "", published.append), published


def ids(tokens: Sequence[int], salt: str = "") -> list[int]:
    return chain_ids(root_id(namespace("m", "", salt)), tokens, PAGE)


ROOT_KEY = Key([])


def test_a_chain_of_nodes_gets_the_prompts_ids_and_depths() -> None:
    events, published = recorder()
    first = Node(Key([1, 2, 3, 4]), Node(ROOT_KEY))
    second = Node(Key([5, 6]), first)

    events.stored(first, PAGE, None)
    events.stored(second, PAGE, None)

    prompt = ids([1, 2, 3, 4, 5, 6])
    assert published == [
        Stored(root_id(namespace("m")), 0, prompt[:2], Tier.DEVICE),
        Stored(prompt[1], 2, prompt[2:], Tier.DEVICE),
    ]


@given(st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_ids_survive_splits(first_cut: int, second_cut: int, named_before: bool) -> None:
    events, published = recorder()
    tokens = list(range(12))
    node = Node(Key(tokens), Node(ROOT_KEY))
    if named_before:
        events.stored(node, PAGE, None)
    published.clear()

    front = node.split(first_cut * PAGE)
    middle = node.split(second_cut * PAGE) if second_cut * PAGE < len(node.key) else None

    for part in (node, middle, front):
        if part is not None:
            events.removed(part, PAGE, None)
    dropped = [page for event in published if isinstance(event, Removed) for page in event.ids]
    assert sorted(dropped) == sorted(ids(tokens))
    assert len(published[0].ids) == len(node.key) // PAGE  # type: ignore[union-attr]


def test_the_extra_key_is_part_of_every_id() -> None:
    events, published = recorder()
    for salt in (None, "tenant"):
        events.stored(Node(Key([1, 2], salt), Node(ROOT_KEY)), PAGE, None)

    assert [event.ids for event in published if isinstance(event, Stored)] == [ids([1, 2]), ids([1, 2], "tenant")]


def test_lower_tiers_are_named() -> None:
    events, published = recorder()
    node = Node(Key([1, 2]), Node(ROOT_KEY))
    for medium in ("GPU", "CPU_PINNED", "DISK", "EXTERNAL"):
        events.stored(node, PAGE, medium)

    assert [event.tier for event in published if isinstance(event, Stored)] == list(Tier)


def test_a_draft_models_tree_is_no_prefix_of_a_prompt() -> None:
    events, published = recorder()
    events.stored(Node(Key([1, 2, 3], None, is_bigram=True), Node(ROOT_KEY)), PAGE, None)

    assert published == []


def test_a_tree_that_was_split_a_thousand_times_is_named_without_recursion() -> None:
    events, published = recorder()
    tokens = list(range(2 * 1200))
    node = Node(Key(tokens), Node(ROOT_KEY))
    for _ in range(1100):  # prompts that are ever longer beginnings of one: each splits a front part off
        node.split(PAGE)
    leaf = Node(Key([7, 7]), node)

    events.stored(leaf, PAGE, None)

    assert published == [Stored(ids(tokens)[-1], 1200, ids([*tokens, 7, 7])[-1:], Tier.DEVICE)]


@pytest.mark.parametrize("salt", ["a\0b", "\ud800"])
def test_a_salt_that_no_router_would_send_harms_nobody(salt: str) -> None:
    events, published = recorder()
    events.stored(Node(Key([1, 2], salt), Node(ROOT_KEY)), PAGE, None)

    assert len(published) == 1
