"""Whatever a router missed, the journal's answer brings it to exactly what the worker holds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.journal import AUDITED_PAGES, REMEMBERED_BATCHES, Journal
from transfer.pages import chain_ids, root_id
from transfer.wire import Batch, CaughtUp, Cleared, PageEvent, PageMessage, PageRequest, Removed, Snapshot, Stored, Tier

Chain = tuple[int, ...]


class Cache:
    """A worker's cache as a set of chains: page (1, 2, 3) has parent (1, 2)."""

    def __init__(self) -> None:
        self.held: set[Chain] = set()

    def do(self, step: Chain | str) -> list[PageEvent]:
        match step:
            case "evict":
                return self.evict()
            case "clear":
                return self.clear()
            case tuple():
                return self.store(step)
        raise AssertionError(step)

    def store(self, chain: Chain) -> list[PageEvent]:
        known = max(n for n in range(len(chain) + 1) if n == 0 or chain[:n] in self.held)
        new = [chain[: n + 1] for n in range(known, len(chain))]
        self.held.update(new)
        return [Stored(page_id(chain[:known]), known, [page_id(page) for page in new])] if new else []

    def evict(self) -> list[PageEvent]:
        leaves = [page for page in self.held if not any(other[:-1] == page for other in self.held)]
        if not leaves:
            return []
        leaf = min(leaves)
        self.held.remove(leaf)
        return [Removed([page_id(leaf)])]

    def clear(self) -> list[PageEvent]:
        self.held.clear()
        return [Cleared()]


def page_id(chain: Chain) -> int:
    return hash(chain) % 2**63 if chain else 0


def follow(messages: list[PageMessage], pages: set[int]) -> set[int]:
    """A router in a few lines: what it believes after these messages. Parents must come first."""
    for message in messages:
        match message:
            case Snapshot(index=index, pages=runs):
                pages = set() if index == 0 else pages
                for run in runs:
                    assert run.depth == 0 or run.parent in pages, "a child came before its parent"
                    pages.update(run.ids)
            case Batch(events=events):
                for event in events:
                    match event:
                        case Stored(ids=ids):
                            pages.update(ids)
                        case Removed(ids):
                            pages.difference_update(ids)
                        case Cleared():
                            pages.clear()
            case CaughtUp():
                pass
    return pages


steps = st.lists(
    st.one_of(
        st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple),
        st.just("evict"),
        st.just("clear"),
    ),
    max_size=30,
)


@given(steps, st.integers(0, 30))
def test_an_answer_from_any_point_leads_to_what_is_held(script: list[Chain | str], seen: int) -> None:
    cache, journal, believed, at = Cache(), Journal("w", 5), set[int](), 0
    for step in script:
        batch = journal.apply(cache.do(step))
        if journal.sequence <= seen:
            believed, at = follow([batch], believed), journal.sequence
    held = {page_id(chain) for chain in cache.held}

    answer = list(journal.answer(PageRequest(5, at)))

    assert set(journal.held) == held
    assert follow(answer, believed) == held
    assert answer[-1] == CaughtUp("w", 5, journal.sequence)


@given(steps)
def test_a_newcomer_and_one_of_another_epoch_get_everything(script: list[Chain | str]) -> None:
    cache, journal = Cache(), Journal("w", 5)
    for step in script:
        journal.apply(cache.do(step))

    for request in (PageRequest(0, 0), PageRequest(4, journal.sequence)):
        assert follow(list(journal.answer(request)), {99}) == {page_id(chain) for chain in cache.held}


@given(steps, st.integers(0, 5))
def test_audits_with_turns_that_follow_each_other_name_every_page_once(script: list[Chain | str], first: int) -> None:
    cache, journal = Cache(), Journal("w", 5)
    for step in script:
        journal.apply(cache.do(step))
    modulus = journal.audit(first).modulus

    audits = [journal.audit(turn) for turn in range(first, first + modulus)]

    named = [page for audit in audits for page in audit.ids]
    assert sorted(named) == sorted(page_id(chain) for chain in cache.held)
    assert {(audit.worker, audit.epoch, audit.sequence) for audit in audits} == {("w", 5, journal.sequence)}
    assert all(page % modulus == audit.residue for audit in audits for page in audit.ids)
    assert {audit.held_pages for audit in audits} == {len(cache.held)}


def test_an_audit_of_many_pages_is_a_sample_of_about_the_same_size() -> None:
    journal = Journal("w", 5)
    journal.apply([Stored(0, 0, chain_ids(root_id("x"), range(20_000), 1))])

    sizes = [len(journal.audit(turn).ids) for turn in range(journal.audit(0).modulus)]

    assert sum(sizes) == 20_000
    assert min(sizes) > AUDITED_PAGES / 2
    assert max(sizes) < 2 * AUDITED_PAGES


def test_a_gap_older_than_the_memory_is_answered_with_a_snapshot() -> None:
    journal = Journal("w", 5)
    for number in range(REMEMBERED_BATCHES + 10):
        journal.apply([Stored(0, 0, [number])])

    near = list(journal.answer(PageRequest(5, journal.sequence - 3)))
    far = list(journal.answer(PageRequest(5, 2)))

    assert [type(message).__name__ for message in near] == ["Batch"] * 3 + ["CaughtUp"]
    assert isinstance(far[0], Snapshot)


def test_batches_are_numbered_from_one() -> None:
    journal = Journal("w", 5)

    assert [journal.apply([Cleared()]).sequence for _ in range(3)] == [1, 2, 3]


def test_a_page_is_held_while_it_lies_in_any_tier() -> None:
    journal = Journal("w", 5)
    journal.apply([Stored(0, 0, [1]), Stored(0, 0, [1], Tier.HOST), Removed([1], Tier.DEVICE)])

    assert next(journal.answer(PageRequest(0, 0))) == Snapshot("w", 5, 0, [Stored(0, 0, [1], Tier.HOST)])
    journal.apply([Removed([1], Tier.HOST)])
    assert journal.held == {}
