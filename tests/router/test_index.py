"""The radix index against a model of plain sets, its bounds, and the truth of what it says of its memory."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise, product
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from router.holder_sets import bits
from router.index import LEAST_BYTES, NODE_BYTES, Index
from router.page_table import NONE
from transfer.pages import chain_ids, root_id
from transfer.wire import Stored, Tier

ROOTS = (root_id("test"), root_id("another"))
ROOT = ROOTS[0]
WORKERS = ("p0", "p1", "p2")
MANY = 10**9
NOWHERE = len(Tier)

Prefix = tuple[int, ...]
"""A namespace's number, then tokens; a page is one token."""


def chain(*tokens: int) -> list[int]:
    return chain_ids(ROOT, tokens, 1)


def ids_of(prefix: Prefix) -> list[int]:
    return chain_ids(ROOTS[prefix[0]], prefix[1:], 1)


class Sets:
    """The same by brute force: for each worker, the tiers in which each prefix's last page lies."""

    def __init__(self) -> None:
        self.held: dict[str, dict[Prefix, set[Tier]]] = {name: {} for name in WORKERS}

    def nearest(self, worker: str, prefix: Prefix) -> int:
        return min(self.held[worker].get(prefix, ()), default=NOWHERE) if len(prefix) > 1 else 0

    def stored(self, worker: str, prefix: Prefix, depth: int, tier: Tier) -> bool:
        if self.nearest(worker, prefix[: depth + 1]) > tier:
            return False
        for end in range(depth + 2, len(prefix) + 1):
            self.held[worker].setdefault(prefix[:end], set()).add(tier)
        return True

    def removed(self, worker: str, prefix: Prefix, tier: Tier) -> None:
        held = self.held[worker]
        held.get(prefix, set()).discard(tier)
        for one in sorted(held, key=len):
            held[one] = {each for each in held[one] if each >= self.nearest(worker, one[:-1])}
        self.held[worker] = {one: tiers for one, tiers in held.items() if tiers}

    def match(self, prompt: Prefix, tier: Tier) -> dict[str, int]:
        lengths = {}
        for name in WORKERS:
            length = 0
            while length + 1 < len(prompt) and self.nearest(name, prompt[: length + 2]) <= tier:
                length += 1
            if length:
                lengths[name] = length
        return lengths

    def everything(self) -> set[Prefix]:
        return {prefix for held in self.held.values() for prefix in held}


def slots_in_use(index: Index) -> list[int]:
    free = set()
    slot = index._first_free
    while slot != NONE:
        free.add(slot)
        slot = index._next_sibling[slot]
    return [slot for slot in range(len(index._ids)) if slot not in free]


def children(index: Index, slot: int) -> Iterator[int]:
    child = index._first_child[slot]
    while child != NONE:
        yield child
        child = index._next_sibling[child]


def assert_sound(index: Index) -> None:
    """Every column agrees with every other."""
    slots = slots_in_use(index)
    roots = [slot for slot in slots if index._parent[slot] == NONE]
    pages = [slot for slot in slots if index._parent[slot] != NONE]
    assert len(index) == len(pages)
    assert {index._table.find(index._ids[slot]) for slot in slots} == set(slots)
    assert sum(entry != NONE for entry in index._table._entries) == len(slots)
    assert Counter(child for slot in slots for child in children(index, slot)) == Counter(pages)
    for slot in slots:
        below = list(children(index, slot))
        assert all(index._parent[child] == slot for child in below)
        assert all(index._previous_sibling[right] == left for left, right in pairwise(below))
        assert all(index._root[child] == index._root[slot] for child in below)
        assert not below or index._previous_sibling[below[0]] == NONE
    assert all(index._used[root] == sum(index._root[page] == root for page in pages) for root in roots)

    leaves, slot = [], index._leaves.oldest
    while slot != NONE:
        leaves.append(slot)
        slot = index._leaves.newer(slot)
    assert sorted(leaves) == [slot for slot in pages if index._first_child[slot] == NONE]

    counted = Counter(rows[page] for rows in index._rows for page in pages)
    masks = index._sets.masks
    assert {row: index._sets._pages[row] for row in range(1, len(masks)) if masks[row]} == {
        row: count for row, count in counted.items() if row
    }
    held = {name: [0] * NOWHERE for name in index._bits}
    for page in pages:
        holders = 0
        for rows in index._rows:
            holders |= masks[rows[page]]
        assert holders
        for bit in bits(holders):
            near, above = index._nearest(page, 1 << bit), index._parent[page]
            assert index._parent[above] == NONE or index._nearest(above, 1 << bit) <= near
            held[index._names[bit]][near] += 1
    assert {name: index._held[bit] for name, bit in index._bits.items()} == held


prefixes = st.tuples(st.sampled_from([0, 0, 0, 1]), st.lists(st.sampled_from([0, 0, 1]), min_size=1, max_size=6)).map(
    lambda drawn: (drawn[0], *drawn[1])
)
workers = st.sampled_from(WORKERS)
tiers = st.sampled_from([Tier.DEVICE, Tier.DEVICE, Tier.HOST, Tier.EXTERNAL])


class Together(RuleBasedStateMachine):
    """The same is done to an index and to the sets."""

    def __init__(self) -> None:
        super().__init__()
        self.index, self.sets = Index(MANY), Sets()
        self.asked: set[Prefix] = set()

    @rule(worker=workers, prefix=prefixes, cut=st.integers(0, 5), tier=tiers)
    def stored(self, worker: str, prefix: Prefix, cut: int, tier: Tier) -> None:
        ids, depth = ids_of(prefix), min(cut, len(prefix) - 2)
        self.asked.add(prefix)
        parent = ids[depth - 1] if depth else ROOTS[prefix[0]]
        noted = self.index.stored(worker, parent, depth, ids[depth:], tier)
        assert noted == self.sets.stored(worker, prefix, depth, tier)
        assert noted or not self.index.complete(worker)

    @rule(worker=workers, prefix=prefixes, tier=tiers)
    def removed(self, worker: str, prefix: Prefix, tier: Tier) -> None:
        self.index.removed(worker, ids_of(prefix)[-1:], tier)
        self.sets.removed(worker, prefix, tier)

    @rule(worker=workers, pick=st.integers(0, 99), every=st.booleans())
    def removed_from_the_middle(self, worker: str, pick: int, every: bool) -> None:
        """Of something that is held: late removals, and pages that left host memory too."""
        held = sorted(self.sets.held[worker].items())
        if held:
            prefix, lies = held[pick % len(held)]
            for tier in sorted(lies) if every else sorted(lies)[:1]:
                self.removed(worker, prefix, tier)

    @rule(worker=workers, forgotten=st.booleans())
    def cleared(self, worker: str, forgotten: bool) -> None:
        (self.index.forget if forgotten else self.index.cleared)(worker)
        self.sets.held[worker] = {}
        assert self.index.complete(worker)

    @rule(number=st.integers(0, 1))
    def namespace_forgotten(self, number: int) -> None:
        gone = {prefix for prefix in self.sets.everything() if prefix[0] == number}
        assert self.index.forget_namespace(ROOTS[number]) == len(gone)
        for worker, held in self.sets.held.items():
            assert not gone & held.keys() or not self.index.complete(worker)
            self.sets.held[worker] = {prefix: lies for prefix, lies in held.items() if prefix not in gone}

    @rule()
    def written_down_and_read_again(self) -> None:
        incomplete = {name: self.index.complete(name) for name in WORKERS}
        self.index = Index.restored(self.index.dump(), MANY)
        assert self.index.orphans == 0
        assert {name: self.index.complete(name) for name in WORKERS} == incomplete

    def teardown(self) -> None:
        """Each worker's snapshot is all that it holds, and is enough for another index."""
        for worker in WORKERS:
            held: dict[int, set[Tier]] = {}
            for run in self.index.snapshot(worker):
                for page in run.ids:
                    held.setdefault(page, set()).add(run.tier)
            assert held == {ids_of(prefix)[-1]: lies for prefix, lies in self.sets.held[worker].items()}
            other = Index(MANY)
            other.restore(worker, self.index.snapshot(worker))
            assert other.orphans == 0
            assert [other.held(worker, tier) for tier in Tier] == [self.index.held(worker, tier) for tier in Tier]
            assert_sound(other)

    @invariant()
    def sound(self) -> None:
        assert_sound(self.index)

    @invariant()
    def equal(self) -> None:
        for prefix, tier in product(sorted(self.asked)[-4:], (Tier.DEVICE, Tier.HOST, Tier.EXTERNAL)):
            assert self.index.match(ids_of(prefix), tier) == self.sets.match(prefix, tier)
        everything = self.sets.everything()
        assert len(self.index) == len(everything)
        counts = Counter(ROOTS[prefix[0]] for prefix in everything)
        assert self.index.namespaces() == counts
        for worker, held in self.sets.held.items():
            ids = {ids_of(prefix)[-1] for prefix in held}
            assert self.index.sample(worker, 1, 0) == ids
            assert self.index.sample(worker, 3, 1) == {page for page in ids if page % 3 == 1}
            for tier in Tier:
                assert self.index.held(worker, tier) == sum(min(lies) <= tier for lies in held.values())


class TogetherOnTheDevice(Together):
    """Without the columns of the other tiers, as most clusters are."""

    @initialize()
    def begin(self) -> None:
        assert len(self.index._rows) == 1

    @rule(worker=workers, prefix=prefixes, cut=st.integers(0, 5))
    def stored(self, worker: str, prefix: Prefix, cut: int) -> None:
        depth = min(cut, len(prefix) - 2)
        ids = ids_of(prefix)
        self.asked.add(prefix)
        self.index.stored(worker, ids[depth - 1] if depth else ROOTS[prefix[0]], depth, ids[depth:])
        self.sets.stored(worker, prefix, depth, Tier.DEVICE)


TestTogether = Together.TestCase
TestTogether.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestTogetherOnTheDevice = TogetherOnTheDevice.TestCase
TestTogetherOnTheDevice.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)


steps = st.lists(st.tuples(workers, prefixes, st.sampled_from(["stored", "stored", "removed", "match"]), tiers))


@settings(max_examples=80, deadline=None)
@given(steps, st.integers(1, 8))
def test_a_full_index_stays_in_its_bound_and_never_invents_pages(
    steps: list[tuple[str, Prefix, str, Tier]], pages: int
) -> None:
    index, sets = Index(pages * NODE_BYTES), Sets()
    for worker, prefix, action, tier in steps:
        ids = ids_of(prefix)
        match action:
            case "stored":
                index.stored(worker, ROOTS[prefix[0]], 0, ids, tier)
                sets.stored(worker, prefix, 0, tier)
            case "removed":
                index.removed(worker, ids[-1:], tier)
                sets.removed(worker, prefix, tier)
        assert len(index) <= pages
        assert_sound(index)
        found, truth = index.match(ids, tier), sets.match(prefix, tier)
        assert all(length <= truth.get(name, 0) for name, length in found.items())
        assert all(found.get(name, 0) == truth.get(name, 0) for name in WORKERS if index.complete(name))


ids = st.integers(0, 12)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(workers, ids, st.integers(0, 2), st.lists(ids, max_size=4), st.booleans(), tiers)))
def test_workers_that_make_up_ids_break_nothing(steps: list[tuple[str, int, int, list[int], bool, Tier]]) -> None:
    index = Index(10 * NODE_BYTES)
    for worker, parent, depth, pages, stores, tier in steps:
        if stores:
            index.stored(worker, parent, depth, pages, tier)
        else:
            index.removed(worker, pages, tier)
        index.match(pages, tier)
        assert len(index) <= 10

    for worker in WORKERS:
        index.forget(worker)
    assert len(index) == len(index._table) == 0
    assert index.namespaces() == {}
    assert_sound(index)


def test_the_least_recently_used_leaf_goes_first() -> None:
    index = Index(4 * NODE_BYTES)
    index.stored("p0", ROOT, 0, chain(1, 1))
    index.stored("p0", ROOT, 0, chain(1, 2))
    index.match(chain(1, 1))  # now (1, 2) is the older leaf
    index.stored("p0", ROOT, 0, chain(3))
    index.stored("p0", ROOT, 0, chain(4))  # a fifth page

    assert index.match(chain(1, 1)) == {"p0": 2}
    assert index.match(chain(1, 2)) == {"p0": 1}
    assert index.match(chain(3)) == {"p0": 1}
    assert index.match(chain(4)) == {"p0": 1}
    assert index.evicted == 1


def test_a_page_that_was_not_used_since_goes_right_after_the_last_one_built_on_it() -> None:
    index = Index(4 * NODE_BYTES)
    index.stored("p0", ROOT, 0, chain(1, 1))
    index.stored("p0", ROOT, 0, chain(2))
    index.stored("p0", ROOT, 0, chain(3, 3))  # a fifth page: (1, 1) goes

    index.stored("p0", ROOT, 0, chain(4))  # a sixth: (1), older than (2)

    assert index.match(chain(1)) == {}
    assert index.match(chain(2)) == {"p0": 1}


def test_a_page_that_prompts_end_with_outlives_what_was_built_on_it() -> None:
    index = Index(4 * NODE_BYTES)
    index.stored("p0", ROOT, 0, chain(1, 1))
    index.stored("p0", ROOT, 0, chain(2))
    index.match(chain(1, 7))  # ends at (1), which is not the end of a chain here
    index.stored("p0", ROOT, 0, chain(3, 3))  # a fifth page: (1, 1) goes

    index.stored("p0", ROOT, 0, chain(4))  # a sixth: (2), older than (1)

    assert index.match(chain(1)) == {"p0": 1}
    assert index.match(chain(2)) == {}


def test_the_place_among_the_leaves_is_that_of_the_last_use_of_any_page_that_went() -> None:
    index = Index(4 * NODE_BYTES)
    index.stored("p0", ROOT, 0, chain(1, 1, 1))
    index.match(chain(1))
    index.match(chain(1, 1, 1))  # later than (1) by itself
    index.stored("p0", ROOT, 0, chain(2))
    index.removed("p0", chain(1, 1)[1:])
    index.stored("p0", ROOT, 0, chain(3, 3, 3))  # a fifth page: (1), older than (2)

    assert index.match(chain(1)) == {}
    assert index.match(chain(2)) == {"p0": 1}


def test_the_page_that_new_ones_follow_is_not_dropped_for_them() -> None:
    index = Index(3 * NODE_BYTES)
    index.stored("p0", ROOT, 0, chain(1, 2))

    index.stored("p0", ROOT, 0, chain(1, 3, 4, 5))

    assert index.match(chain(1, 3, 4, 5)) == {"p0": 3}
    assert_sound(index)


def test_a_prompt_longer_than_the_index_keeps_its_beginning() -> None:
    index = Index(3 * NODE_BYTES)

    index.stored("p0", ROOT, 0, chain(1, 2, 3, 4, 5))

    assert index.match(chain(1, 2, 3, 4, 5)) == {"p0": 3}


def test_pages_after_an_unknown_page_are_not_taken_in() -> None:
    index = Index(MANY)
    ids = chain(1, 2, 3)
    index.stored("p0", ROOT, 0, ids[:1])

    assert not index.stored("p1", ids[0], 1, ids[1:])  # p1 does not hold the first page
    assert not index.stored("p0", ids[1], 2, ids[2:])  # nobody holds the second

    assert index.match(ids) == {"p0": 1}
    assert index.orphans == 3


def test_a_page_that_is_known_after_another_page_is_not_taken_in() -> None:
    index = Index(MANY)
    ids = chain(1, 2, 3)
    index.stored("p0", ROOT, 0, ids)

    assert not index.stored("p1", ROOT, 0, [ids[0], ids[2]])  # p1 would not hold the second
    assert not index.stored("p1", ids[0], 0, ids[1:])  # the first is no namespace

    assert index.match(ids) == {"p0": 3, "p1": 1}
    assert not index.complete("p1")


def test_a_page_is_not_taken_in_nearer_than_the_page_before_it() -> None:
    index = Index(MANY)
    ids = chain(1, 2)
    index.stored("p0", ROOT, 0, ids[:1], Tier.HOST)

    assert not index.stored("p0", ids[0], 1, ids[1:], Tier.DEVICE)

    assert index.match(ids, Tier.HOST) == {"p0": 1}
    assert not index.complete("p0")


def test_a_page_moved_to_host_memory_counts_only_where_that_is_asked_for() -> None:
    index = Index(MANY)
    ids = chain(1, 2, 3)
    index.stored("p0", ROOT, 0, ids)
    index.stored("p0", ids[0], 1, ids[1:], Tier.HOST)
    index.removed("p0", ids[2:])

    assert index.match(ids) == {"p0": 2}
    assert index.match(ids, Tier.HOST) == {"p0": 3}
    assert (index.held("p0", Tier.DEVICE), index.held("p0")) == (2, 3)

    index.removed("p0", ids[1:2])  # a late removal, of a page that lies in host memory too

    assert index.match(ids) == {"p0": 1}
    assert index.match(ids, Tier.HOST) == {"p0": 3}


def test_a_worker_is_complete_until_a_page_of_it_is_dropped_or_not_taken_in() -> None:
    index = Index(2 * NODE_BYTES)
    index.stored("p0", ROOT, 0, chain(1))
    index.stored("p1", ROOT, 0, chain(2))
    assert index.complete("p0")

    index.stored("p1", ROOT, 0, chain(3))  # takes the place of p0's page

    assert not index.complete("p0")
    assert index.complete("p1")
    index.stored("p1", chain(3)[0], 7, chain(9))  # a page before it is not known
    index.stored("p2", ROOT, 0, chain(4, 5, 6))  # longer than the index
    assert not index.complete("p1")
    assert not index.complete("p2")
    index.cleared("p0")
    index.forget("p1")
    assert index.complete("p0")
    assert index.complete("p1")


def test_a_forgotten_workers_place_is_used_by_the_next() -> None:
    index = Index(MANY)
    index.stored("p0", ROOT, 0, chain(1))
    index.forget("p0")

    index.stored("p1", ROOT, 0, chain(2))

    assert index.match(chain(1)) == {}
    assert index.match(chain(2)) == {"p1": 1}
    assert len(index._names) == 1


def test_a_sample_with_a_residue_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="residue: wanted 0 to 4, found 5"):
        Index(MANY).sample("p0", 5, 5)


@pytest.mark.parametrize(
    ("dump", "message"),
    [
        (msgspec.msgpack.encode([2, []]), "wanted version 1, found 2"),
        (msgspec.msgpack.encode([1, 7]), "Expected `array`"),
        (b"", "truncated"),
        (b"nonsense", "dump of an index"),
    ],
)
def test_what_is_no_dump_of_this_version_is_refused(dump: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Index.restored(dump, MANY)


def test_a_dump_read_into_a_smaller_index_leaves_nobody_whose_pages_went_complete() -> None:
    index = Index(MANY)
    index.stored("p0", ROOT, 0, chain(1, 2, 3))
    index.stored("p1", ROOT, 0, chain(4))

    smaller = Index.restored(index.dump(), 3 * NODE_BYTES)

    assert len(smaller) == 3
    assert not smaller.complete("p0")
    assert smaller.match(chain(4)) == {"p1": 1}


def test_a_snapshot_joins_the_pages_of_a_chain() -> None:
    index = Index(MANY)
    index.stored("p0", ROOT, 0, chain(1, 2, 3))
    index.stored("p0", ROOT, 0, chain(1, 2, 4))

    assert sorted(index.snapshot("p0"), key=lambda run: -len(run.ids)) in (
        [Stored(ROOT, 0, chain(1, 2, 3)), Stored(chain(1, 2)[-1], 2, chain(1, 2, 4)[-1:])],
        [Stored(ROOT, 0, chain(1, 2, 4)), Stored(chain(1, 2)[-1], 2, chain(1, 2, 3)[-1:])],
    )


@pytest.mark.parametrize("tiers", [[Tier.DEVICE], list(Tier)])
def test_what_it_says_of_its_memory_is_true_and_below_a_hundred_bytes_a_page(tiers: list[Tier]) -> None:
    # With 2**12 pages and a root the table was just doubled: the most that a page can cost.
    prompts = [chain_ids(ROOT, range(number, number + 128), 1) for number in range(0, 4096, 128)]
    tracemalloc.start()
    index = Index(MANY)
    for prompt in prompts:
        for tier in tiers:
            index.stored("p0", ROOT, 0, prompt, tier)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert len(index) == 4096
    assert len(index._table._entries) == 4 * 4096
    assert 0.9 < taken / index.bytes < 1.1
    assert index.bytes <= 100 * len(index)


def test_five_hundred_holders_cost_a_page_no_more_than_one() -> None:
    ids = chain_ids(ROOT, range(500), 1)
    one, many = Index(MANY), Index(MANY)
    one.stored("p0", ROOT, 0, ids)
    names_only = Index(MANY)

    for number in range(512):
        many.stored(f"p{number}", ROOT, 0, ids)
        names_only.stored(f"p{number}", ROOT, 0, [])

    assert many.held("p511") == 500
    assert many.bytes - names_only.bytes < one.bytes - Index(MANY).bytes + 2000


def test_the_bound_holds_though_every_page_has_holders_of_its_own() -> None:
    max_bytes, random = 4 * LEAST_BYTES, Random(1)
    tracemalloc.start()
    index = Index(max_bytes)
    for number in range(index.max_nodes):
        ids = chain(number)
        for worker in random.sample(range(200), 3):
            index.stored(f"p{worker}", ROOT, 0, ids)
        assert number % 8 or index.bytes <= max_bytes + LEAST_BYTES  # names and counts
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert 100 < len(index) < index.max_nodes // 2  # the sets took the room
    assert taken <= max_bytes + LEAST_BYTES
    assert_sound(index)
