"""The radix index against a model of plain sets, and its bounds."""

from __future__ import annotations

import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from router.index import NODE_BYTES, Index
from transfer.pages import chain_ids, root_id
from transfer.wire import Tier

ROOT = root_id("test")
WORKERS = ("p0", "p1", "p2")
MANY = 10**9


def chain(*tokens: int) -> list[int]:
    return chain_ids(ROOT, tokens, 1)


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=6)
actions = st.one_of(
    st.tuples(st.just("stored"), st.sampled_from(WORKERS), prompts, st.integers(0, 5)),
    st.tuples(st.just("removed"), st.sampled_from(WORKERS), prompts, st.integers(0, 5)),
    st.tuples(st.just("cleared"), st.sampled_from(WORKERS), prompts, st.just(0)),
    st.tuples(st.just("forget"), st.sampled_from(WORKERS), prompts, st.just(0)),
)


class Sets:
    """The same by brute force: for each worker, the prefixes that it holds, as token tuples."""

    def __init__(self) -> None:
        self.held: dict[str, set[tuple[int, ...]]] = {name: set() for name in WORKERS}

    def stored(self, worker: str, prompt: list[int], depth: int) -> None:
        if depth and tuple(prompt[:depth]) not in self.held[worker]:
            return
        self.held[worker] |= {tuple(prompt[:end]) for end in range(depth + 1, len(prompt) + 1)}

    def removed(self, worker: str, prefix: list[int]) -> None:
        gone = tuple(prefix)
        self.held[worker] = {one for one in self.held[worker] if one[: len(gone)] != gone}

    def match(self, prompt: list[int]) -> dict[str, int]:
        lengths = {}
        for name, held in self.held.items():
            length = 0
            while length < len(prompt) and tuple(prompt[: length + 1]) in held:
                length += 1
            if length:
                lengths[name] = length
        return lengths


@settings(max_examples=150, deadline=None)
@given(st.lists(actions, max_size=40), st.lists(prompts, max_size=8))
def test_every_match_is_what_the_sets_say(steps: list[tuple[str, str, list[int], int]], asked: list[list[int]]) -> None:
    index, sets = Index(MANY), Sets()
    for action, worker, prompt, cut in steps:
        ids = chain(*prompt)
        depth = min(cut, len(prompt) - 1)
        match action:
            case "stored":
                index.stored(worker, ids[depth - 1] if depth else ROOT, depth, ids[depth:])
                sets.stored(worker, prompt, depth)
            case "removed":
                index.removed(worker, [ids[depth]])
                sets.removed(worker, prompt[: depth + 1])
            case "cleared":
                index.cleared(worker)
                sets.held[worker] = set()
            case "forget":
                index.forget(worker)
                sets.held[worker] = set()
    for prompt in [*asked, *(step[2] for step in steps)]:
        assert index.match(chain(*prompt)) == sets.match(prompt)
    assert {name: index.held(name) for name in WORKERS} == {name: len(held) for name, held in sets.held.items()}
    assert len(index) == len(set.union(*sets.held.values()))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(WORKERS), prompts, st.booleans()), max_size=60), st.integers(1, 8))
def test_a_full_index_stays_in_its_bound_and_never_invents_pages(
    steps: list[tuple[str, list[int], bool]], pages: int
) -> None:
    index, sets = Index(pages * NODE_BYTES), Sets()
    for worker, prompt, remove in steps:
        if remove:
            index.removed(worker, chain(*prompt)[-1:])
            sets.removed(worker, prompt)
        else:
            index.stored(worker, ROOT, 0, chain(*prompt))
            sets.stored(worker, prompt, 0)
        assert len(index) <= pages
        truth = sets.match(prompt)
        assert all(found <= truth.get(name, 0) for name, found in index.match(chain(*prompt)).items())


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


def test_other_tiers_do_not_count_yet() -> None:
    index = Index(MANY)
    ids = chain(1, 2)
    index.stored("p0", ROOT, 0, ids)

    index.stored("p1", ROOT, 0, ids, Tier.HOST)
    index.removed("p0", ids, Tier.HOST)

    assert index.match(ids) == {"p0": 2}


def test_a_forgotten_workers_place_is_used_by_the_next() -> None:
    index = Index(MANY)
    index.stored("p0", ROOT, 0, chain(1))
    index.forget("p0")

    index.stored("p1", ROOT, 0, chain(2))

    assert index.match(chain(1)) == {}
    assert index.match(chain(2)) == {"p1": 1}


def test_stores_and_removals_without_end_do_not_grow_the_index() -> None:
    index = Index(MANY)
    for token in range(20_000):
        index.stored("p0", ROOT, 0, chain(token, token))
        index.removed("p0", chain(token, token))

    assert len(index) == 0
    assert len(index._ids) <= 4  # slots are used again
    assert len(index._leaves) < 4_000  # and so is the queue of leaves


def test_the_estimate_of_memory_is_near_the_truth() -> None:
    ids = [chain_ids(ROOT, range(number, number + 100), 1) for number in range(0, 50_000, 100)]
    tracemalloc.start()
    index = Index(MANY)
    for prompt in ids:
        for worker in ("p0", "p1"):
            index.stored(worker, ROOT, 0, prompt)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert len(index) == 50_000
    # The ids themselves are owned by `ids` here, but by the index in a router: 32 bytes each.
    assert 0.75 < (taken + 32 * len(index)) / index.bytes < 1.25
