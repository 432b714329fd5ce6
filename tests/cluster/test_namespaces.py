"""SGLang's own radix tree, our hooks, our journal: pages of one tenant outlive those of another.

The same tokens under two extra keys have two sets of ids. SGLang's own events name
both alike, so an eviction of one would drop both from an index.
"""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from engine.journal import Journal
from engine.page_events import PageEvents
from router.index import Index
from transfer.pages import chain_ids, namespace, root_id
from transfer.wire import PageEvent, Removed, Stored, Tier

pytestmark = pytest.mark.filterwarnings("ignore")  # what SGLang and its libraries warn of when they are imported

PAGE = 4
TOKENS = list(range(100, 116))


class Allocator:
    """SGLang's tree frees slots as it evicts; where they go does not matter here."""

    device = "cpu"

    def free(self, slots: Any) -> None:
        """Nothing to free."""


class Tree:
    """The real tree, with its recording replaced as the plug-in replaces it."""

    def __init__(self) -> None:
        # Imported here: it takes half a minute, also where these tests are only collected.
        import torch
        from sglang.srt.mem_cache import base_prefix_cache, radix_cache

        self._torch, self._parameters, self._radix_cache = torch, base_prefix_cache, radix_cache
        self.events: list[PageEvent] = []
        recorded = PageEvents("m", "", self.events.append)
        self.cache = radix_cache.RadixCache.create_simulated(
            page_size=PAGE, enable_kv_cache_events=True, mock_allocator=Allocator()
        )
        self.cache._record_store_event = lambda node, medium=None: recorded.stored(node, PAGE, medium)
        self.cache._record_remove_event = lambda node, medium=None: recorded.removed(node, PAGE, medium)

    def insert(self, tokens: list[int], extra_key: str | None) -> None:
        key = self._radix_cache.RadixKey(array("q", tokens), extra_key)
        self.cache.insert(self._parameters.InsertParams(key=key, value=self._torch.arange(len(tokens))))

    def evict(self, tokens: int) -> None:
        self.cache.evict(self._parameters.EvictParams(num_tokens=tokens))


def ids(tokens: list[int], salt: str = "") -> list[int]:
    return chain_ids(root_id(namespace("m", "", salt)), tokens, PAGE)


def indexed(events: list[PageEvent]) -> Index:
    journal = Journal("w", 1)
    index = Index(max_bytes=10_000_000)
    for event in journal.apply(events).events:
        match event:
            case Stored(parent, depth, pages, tier):
                index.stored("w", parent, depth, pages, tier)
            case Removed(pages, tier):
                index.removed("w", pages, tier)
    return index


def test_evicting_one_tenants_pages_leaves_the_others_in_the_index() -> None:
    tree = Tree()
    tree.insert(TOKENS, "red")
    tree.insert(TOKENS, "blue")
    both = indexed(tree.events)
    assert both.match(ids(TOKENS, "red")) == both.match(ids(TOKENS, "blue")) == {"w": 4}

    tree.evict(len(TOKENS))

    left = indexed(tree.events)
    assert left.match(ids(TOKENS, "red")) == {}
    assert left.match(ids(TOKENS, "blue")) == {"w": 4}


def test_ids_are_the_prompts_also_after_the_tree_split_its_nodes() -> None:
    tree = Tree()
    longer, other = [*TOKENS, 1, 2, 3, 4], [*TOKENS[:8], 9, 9, 9, 9]
    for tokens in (TOKENS, longer, other):
        tree.insert(tokens, None)

    index = indexed(tree.events)

    assert index.match(ids(longer)) == {"w": 5}
    assert index.match(ids(other)) == {"w": 3}
    stored = [event for event in tree.events if isinstance(event, Stored)]
    assert all(event.tier is Tier.DEVICE for event in stored)

    tree.evict(1000)
    assert indexed(tree.events).match(ids(longer)) == {}
