"""Workers on paper: their caches, their queues, and what shadows report."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.config import CostConfig, RouterSection
from router.cost import CostModel
from router.page_lru import PageLru
from router.paper_fleet import PaperFleet
from router.policies import make_policy
from router.policy import Ask, PrefillView
from router.shadow import Shadows

COST = CostConfig(prefill_overhead_s=0, prefill_tokens_per_s=1000, context_halving_tokens=1e12)
CAPACITIES = {"p0": 16_000, "p1": 16_000}


def ask(number: int, ids: tuple[int, ...], now_s: float = 0.0) -> Ask:
    return Ask(number=number, prompt_tokens=16 * len(ids) + 1, page_tokens=16, ids=ids, now_s=now_s)


chains = st.lists(st.integers(0, 2), max_size=6).map(
    lambda path: tuple(int("1" + "".join(map(str, path[: end + 1]))) for end in range(len(path)))
)


@settings(max_examples=150, deadline=None)
@given(st.lists(chains, max_size=30), st.integers(1, 12))
def test_the_oldest_leaf_is_dropped_first(prompts: list[tuple[int, ...]], capacity: int) -> None:
    cache, used = PageLru(capacity), dict[int, int]()
    for clock, ids in enumerate(prompts):
        assert cache.match(ids) == next((place for place, page in enumerate(ids) if page not in used), len(ids))
        cache.use(ids)
        used.update(dict.fromkeys(ids, clock))
        while len(used) > capacity:
            parents = {page // 10 for page in used}
            leaves = [page for page in used if page not in parents]
            del used[min(leaves, key=lambda page: (used[page], -len(str(page))))]
        assert len(cache) == len(used) <= capacity


def test_a_request_waits_for_the_one_before_it_and_hits_what_that_left() -> None:
    fleet = PaperFleet(make_policy("round_robin", COST, 0), CostModel(COST))
    ids = tuple(range(10))
    first = fleet.place(ask(1, ids), {"p0": 16_000})
    second = fleet.place(ask(2, ids), {"p0": 16_000})

    assert (first.cached_tokens, second.cached_tokens) == (0, 160)
    assert second.begins_s == first.ends_s == pytest.approx(0.161)
    assert fleet.hit_rate == 160 / 322


def test_a_worker_that_is_gone_leaves_no_requests_behind_and_comes_back_empty() -> None:
    fleet = PaperFleet(make_policy("dynamo_kv", COST, 0), CostModel(COST))
    ids = tuple(range(10))
    for number in range(6):
        fleet.place(ask(number, ids), CAPACITIES)
    for name in CAPACITIES:
        fleet.lost(name)
    fleet.place(ask(6, (50,), 0.0), {"p2": 16_000})
    assert len(fleet._expected) == 1

    assert fleet.place(ask(7, ids, 9.0), {"p0": 16_000}).cached_tokens == 0


def test_a_worker_that_takes_no_requests_for_a_while_keeps_what_it_held() -> None:
    fleet = PaperFleet(make_policy("longest_prefix", COST, 0), CostModel(COST))
    ids = tuple(range(10))
    held_by = fleet.place(ask(0, ids), CAPACITIES).worker
    other = {name: tokens for name, tokens in CAPACITIES.items() if name != held_by}

    assert fleet.place(ask(1, ids, 9.0), other).worker != held_by
    assert fleet.place(ask(2, (*ids, 77), 18.0), {held_by: 16_000}).cached_tokens == 160


def test_what_would_wait_longer_than_a_client_does_is_refused() -> None:
    fleet = PaperFleet(make_policy("longest_prefix", COST, 0), CostModel(COST), longest_wait_s=5.0)
    ids = tuple(range(100))
    placed = [fleet.place(ask(number, (*ids, 1000 + number)), {"p0": 1_600_000}) for number in range(1000)]

    assert 0 < fleet.refused < 1000
    assert all(one.begins_s <= 5 for one in placed if one.begins_s < inf)
    assert len(fleet._expected) == 1000 - fleet.refused


def test_shadows_report_hits_and_imbalance_of_each_policy() -> None:
    section = RouterSection(shadow_policies=("round_robin", "longest_prefix"), cost=COST)
    shadows = Shadows(section, CostModel(COST))
    views = [PrefillView(name=name, capacity_tokens=tokens) for name, tokens in CAPACITIES.items()]
    for number in range(8):
        shadows.observe(ask(number, tuple(range(100)), 10.0 * number), views)
    shadows.observe(Ask(number=9, prompt_tokens=500, page_tokens=16), views)

    turns, longest = shadows
    assert (turns.policy.name, longest.policy.name) == ("round_robin", "longest_prefix")
    assert turns.requests == longest.requests == 8
    assert turns.hit_rate == 6 * 1600 / (8 * 1601)
    assert turns.imbalance == 1.0
    assert longest.hit_rate == 7 * 1600 / (8 * 1601)
    assert longest.imbalance == 2.0
