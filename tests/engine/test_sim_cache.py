"""The simulated prefix cache: what it holds, what it drops first, and that its pages add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.journal import Journal
from engine.sim_cache import Node, SimCache
from transfer.wire import Cleared, Removed, Stored

ROOT = 7


def chain(text: str) -> tuple[int, ...]:
    """A page for each letter. Equal beginnings give equal ids."""
    return tuple(int.from_bytes(text[: end + 1].encode()) for end in range(len(text)))


def put(cache: SimCache, text: str) -> None:
    """A request that comes, computes its pages and ends."""
    ids = chain(text)
    node, held = cache.match(ids, len(ids))
    missing = len(ids) - held
    if cache.free < missing:
        cache.evict(missing)
    cache.take(missing)
    cache.insert(node, held, ids, len(ids))


def test_the_leaf_that_was_not_used_for_longest_goes_first_and_its_parent_after_it() -> None:
    cache = SimCache(10)
    for text in ("abc", "abd", "xy"):
        put(cache, text)
    cache.match(chain("abc"), 3)

    assert cache.evict(1) == 1
    assert [cache.holds(chain(text)) for text in ("abc", "abd", "xy")] == [3, 2, 2]
    assert cache.evict(1) == 2
    assert [cache.holds(chain(text)) for text in ("abc", "xy")] == [3, 0]
    assert cache.evict(2) == 3
    assert (cache.held, cache.free) == (0, 10)


def test_a_run_goes_as_a_whole_however_little_is_wanted() -> None:
    cache = SimCache(10)
    put(cache, "abcdef")

    assert cache.evict(1) == 6


def test_a_match_in_the_middle_of_a_run_splits_it_and_the_back_can_go_alone() -> None:
    cache = SimCache(10)
    put(cache, "abcdef")

    node, held = cache.match(chain("abcx"), 4)
    cache.lock(node)

    assert held == 3
    assert cache.evict(10) == 3
    assert cache.holds(chain("abcdef")) == 3
    assert cache.events == [
        Stored(0, 0, list(chain("abcdef"))),
        Removed(list(chain("abcdef"))[3:]),
    ]


def test_a_match_takes_no_more_pages_than_asked_for() -> None:
    cache = SimCache(10)
    put(cache, "abcd")

    assert cache.match(chain("abcd"), 3)[1] == 3


def test_a_locked_run_stays_locked_when_another_request_splits_it() -> None:
    cache = SimCache(10)
    put(cache, "abcd")
    whole, _ = cache.match(chain("abcd"), 4)
    cache.lock(whole)
    cache.match(chain("abx"), 3)

    assert (cache.evict(10), cache.locked) == (0, 4)
    cache.unlock(whole)
    assert (cache.evict(10), cache.locked) == (4, 0)


def test_pages_that_another_request_stored_meanwhile_are_known_at_insertion() -> None:
    cache = SimCache(10)
    cache.take(3)
    put(cache, "ab")

    _, known = cache.insert(cache.top, 0, chain("abc"), 3)
    cache.give(known)

    assert known == 2
    assert (cache.free, cache.held) == (7, 3)


def test_pages_count_as_used_again_when_the_request_that_matched_them_puts_them_back() -> None:
    cache = SimCache(10)
    put(cache, "ab")
    node, held = cache.match(chain("ab"), 2)
    put(cache, "xy")
    cache.insert(node, held, chain("ab"), 2)

    assert cache.evict(1) == 2
    assert (cache.holds(chain("ab")), cache.holds(chain("xy"))) == (2, 0)


def test_more_pages_than_are_free_cannot_be_taken() -> None:
    with pytest.raises(RuntimeError, match="4 pages wanted"):
        SimCache(3).take(4)


def test_a_cache_in_use_cannot_be_cleared() -> None:
    cache = SimCache(3)
    put(cache, "ab")
    node, _ = cache.match(chain("ab"), 2)
    cache.lock(node)

    with pytest.raises(RuntimeError, match="still use"):
        cache.clear()
    cache.unlock(node)
    cache.clear()
    assert (cache.free, cache.held, cache.events[-1]) == (3, 0, Cleared())
    put(cache, "ab")
    assert cache.evict(3) == 2


@dataclass
class PageByPage:
    """The same rules for single pages, as slow as that is: what is held, and since when it was not used.

    starts  the pages with which a run starts; a run is used as a whole, and then cut where the use ended
    """

    used: dict[str, int] = field(default_factory=dict)
    starts: set[str] = field(default_factory=set)
    locks: list[str] = field(default_factory=list)
    clock: int = 0

    def touch(self, text: str) -> None:
        self.clock += 1
        for end in range(1, len(text) + 1):
            if text[:end] in self.used:
                self.used[text[:end]] = self.clock
        rest = self.rest_of_run(text[: self.held(text)])
        self.starts.update(rest[:1])
        for page in rest:
            self.used[page] = self.clock

    def rest_of_run(self, last: str) -> list[str]:
        """The pages after this one in its run."""
        rest = [one for one in self.used if last and one[:-1] == last and one not in self.starts]
        return rest and rest + self.rest_of_run(rest[0])

    def store(self, text: str) -> None:
        if self.held(text) < len(text):
            self.starts.add(text[: self.held(text) + 1])
        self.clock += 1
        for end in range(1, len(text) + 1):
            self.used[text[:end]] = self.clock

    def drop(self, page: str) -> None:
        del self.used[page]
        self.starts.discard(page)

    def held(self, text: str) -> int:
        return next((end for end in range(len(text)) if text[: end + 1] not in self.used), len(text))

    def is_locked(self, prefix: str) -> bool:
        return any(text.startswith(prefix) for text in self.locks)

    def oldest(self) -> int:
        """Clock of the leaf that may go first."""
        return min(
            used
            for prefix, used in self.used.items()
            if not self.is_locked(prefix) and not any(one != prefix and one.startswith(prefix) for one in self.used)
        )


texts = st.text("abc", min_size=1, max_size=8)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), texts),
        st.tuples(st.just("match"), texts),
        st.tuples(st.just("lock"), texts),
        st.tuples(st.just("unlock"), texts),
        st.tuples(st.just("evict"), texts),
    ),
    max_size=60,
)


def expected_ids(texts_held: Sequence[str]) -> set[int]:
    return {int.from_bytes(text.encode()) for text in texts_held}


@settings(max_examples=150, deadline=None)
@given(steps)
def test_any_history_leaves_the_same_pages_as_the_rules_applied_page_by_page(steps: list[tuple[str, str]]) -> None:
    pages = 24
    cache, model = SimCache(pages, ROOT), PageByPage()
    journal = Journal("w", 1)
    locked: list[Node] = []

    def follow(events_before: int) -> None:
        for event in cache.events[events_before:]:
            if isinstance(event, Removed):
                for page in event.ids:
                    text = page.to_bytes((page.bit_length() + 7) // 8).decode()
                    assert not model.is_locked(text), "a page in use was dropped"
                    dropped.append((text, model.used[text]))

    for what, text in steps:
        ids = chain(text)
        before, dropped = len(cache.events), list[tuple[str, int]]()
        match what:
            case "put":
                if len(ids) - cache.holds(ids) > cache.free + cache.evictable:
                    continue
                node, held = cache.match(ids, len(ids))
                model.touch(text)
                cache.lock(node)
                model.locks.append(text[:held])
                missing = len(ids) - held
                if missing > cache.free + cache.evictable:
                    cache.unlock(node)
                    model.locks.pop()
                    continue
                if cache.free < missing:
                    cache.evict(missing)
                    follow(before)
                    for gone, _ in dropped:
                        model.drop(gone)
                cache.take(missing)
                leaf, known = cache.insert(node, held, ids, len(ids))
                assert known == held
                cache.unlock(node)
                model.locks.pop()
                model.store(text)
                assert leaf.ids[-1] == ids[-1]
            case "match":
                assert cache.match(ids, len(ids))[1] == model.held(text)
                model.touch(text)
            case "lock":
                node, held = cache.match(ids, len(ids))
                model.touch(text)
                cache.lock(node)
                locked.append(node)
                model.locks.append(text[:held])
            case "unlock" if locked:
                cache.unlock(locked.pop())
                model.locks.pop()
            case "evict" if cache.evictable:
                oldest = model.oldest()
                cache.evict(len(text))
                follow(before)
                assert dropped[0][1] == oldest, "another leaf was not used for longer"
                assert len(dropped) >= len(text) or not cache.evictable
                for gone, _ in dropped:
                    model.drop(gone)
        assert cache.free + cache.held == pages
        assert cache.held == len(model.used)
        assert cache.locked == sum(model.is_locked(prefix) for prefix in model.used)
        assert all(cache.holds(chain(one)) == len(one) for one in model.used)

    journal.apply(cache.events)
    assert set(journal.held) == expected_ids(list(model.used))
    assert all(
        (parent, depth) == (ROOT if not depth else int.from_bytes(text[:-1].encode()), len(text) - 1)
        for text in model.used
        for parent, depth, _ in [journal.held[int.from_bytes(text.encode())]]
    )
