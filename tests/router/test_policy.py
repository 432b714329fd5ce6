"""Our choices between pairs, with their arithmetic."""

from __future__ import annotations

import pytest

from router.config import CostConfig
from router.cost import CostModel, Work
from router.decision import SHOWN_CANDIDATES, Decision
from router.pair_cost import PairCost
from router.pairs import Pairs
from router.policy import Ask, DecodeView, NoWorker, Pick, PrefillView, usable_tokens

COST = CostConfig(
    alpha=4,
    prefill_overhead_s=0,
    prefill_tokens_per_s=1000,
    context_halving_tokens=1e12,  # every token costs 1 ms
    handoff_bytes_per_s=1e9,
    page_bytes=1000,
    decode_request_s=0.02,
    tie_fraction=0.05,
    hot_requests=2,
    copy_tokens=1000,
)
D0 = DecodeView(name="d0")


def holding(name: str, pages: int, **others: float | bool) -> PrefillView:
    return PrefillView(name=name, held_pages=pages, expected_pages=pages, **others)  # type: ignore[arg-type]


def decide(
    prefills: list[PrefillView],
    decodes: list[DecodeView] | None = None,
    *,
    prompt_tokens: int = 1600,
    number: int = 0,
    seed: int = 0,
    cost: CostConfig = COST,
) -> Decision:
    ask = Ask(number=number, prompt_tokens=prompt_tokens, page_tokens=16)
    pairs = Pairs(ask, prefills, decodes or [D0], CostModel(cost))
    return Decision(pairs, PairCost(cost, seed).choose(ask, pairs), "mainstem", cost.alpha)


def of_speeds(prefills: list[PrefillView], slowness: dict[str, float]) -> Pick:
    """The choice where each worker was found to take so many times a second for a thousand tokens."""
    model = CostModel(COST)
    for _ in range(16):
        for name, slower in slowness.items():
            model.learn_prefill(name, Work.of(1000, 1000), slower)
    ask = Ask(number=0, prompt_tokens=1600, page_tokens=16)
    return PairCost(COST, 0).choose(ask, Pairs(ask, prefills, [D0], model))


def test_the_holder_of_the_prefix_gets_the_request() -> None:
    decision = decide([PrefillView(name="p0"), holding("p1", 62)])

    assert decision.prefill == "p1"
    assert decision.matched_tokens == 992  # 62 pages of 16
    assert decision.uncached_tokens == 608
    assert decision.reason.startswith("cache: holds 992 tokens")


def test_a_prefix_is_worth_four_times_its_seconds_of_waiting() -> None:
    # 800 tokens cached save 4 * 0.8 s; equals within 5 % of 4 * 1.6 s are told apart by what they were sent lately.
    def busy(wait_s: float) -> PrefillView:
        return holding("p1", 50, wait_s=wait_s, recent_tokens=1.0)

    assert decide([PrefillView(name="p0"), busy(2.8)]).prefill == "p1"
    assert decide([PrefillView(name="p0"), busy(3.3)]).prefill == "p0"


def test_a_long_queue_outweighs_the_cache_and_the_reason_says_so() -> None:
    decision = decide([PrefillView(name="p0"), holding("p1", 50, wait_s=30)])

    assert decision.prefill == "p0"
    assert decision.cache_choice == "p1"
    assert decision.load_choice == "p0"
    assert decision.reason == "load: p1 holds 800 tokens but would wait 30000 ms"


def test_a_spill_goes_to_the_second_best_holder() -> None:
    decision = decide([PrefillView(name="p0"), holding("p1", 50, wait_s=30), holding("p2", 40)])

    assert decision.prefill == "p2"
    assert decision.reason == "spill: holds 640 tokens, p1 holds 800 tokens but would wait 30000 ms"


def test_the_reason_says_why_the_holder_did_not_get_the_request_where_nobody_would_wait() -> None:
    unsure = decide([holding("p0", 40), holding("p1", 50, trust=0.5)])
    slow = of_speeds([PrefillView(name="p0"), holding("p1", 50)], {"p0": 1, "p1": 30, "p2": 1})

    assert unsure.reason == "spill: holds 640 tokens, p1 holds 800 tokens but that is not sure"
    assert slow.reason == "load: p1 holds 800 tokens but is slower"


def test_a_slower_worker_idles_only_while_a_faster_one_is_sooner_done() -> None:
    def busy(wait_s: float) -> str:
        idle = PrefillView(name="p1")
        return of_speeds([PrefillView(name="p0", wait_s=wait_s), idle], {"p0": 1, "p1": 1.5, "p2": 1}).prefill.name

    assert busy(0.4) == "p0"  # 0.4 + 1.6 s, against 2.4 s; 0.32 s more would be no difference
    assert busy(0.9) == "p1"


def test_what_an_unsure_index_says_counts_half_and_what_it_does_not_know_nothing() -> None:
    sure = holding("p0", 30)

    assert decide([sure, holding("p1", 48, trust=0.5)]).prefill == "p0"  # 480 against half of 768
    assert decide([sure, holding("p1", 90, trust=0.5)]).prefill == "p1"
    assert decide([sure, holding("p1", 90, trust=0.0)]).prefill == "p0"


def test_pages_that_are_being_computed_count_like_held_ones() -> None:
    computing = PrefillView(name="p1", held_pages=0, expected_pages=50, wait_s=0.8, recent_tokens=800.0)

    decision = decide([PrefillView(name="p0"), computing])

    assert (decision.prefill, decision.matched_tokens) == ("p1", 800)
    assert [(one.prefill, one.expected_tokens) for one in decision.candidates] == [("p1", 800), ("p0", 0)]


def test_the_engine_always_computes_the_last_token() -> None:
    assert usable_tokens(pages=4, prompt_tokens=64, page_tokens=16) == 48
    assert usable_tokens(pages=4, prompt_tokens=65, page_tokens=16) == 64
    assert usable_tokens(pages=9, prompt_tokens=65, page_tokens=16) == 64
    assert usable_tokens(pages=1, prompt_tokens=1, page_tokens=16) == 0


def test_idle_equals_are_filled_in_turn() -> None:
    recent = {"p0": 0.0, "p1": 0.0, "p2": 0.0}
    for number in range(30):
        views = [PrefillView(name=name, recent_tokens=tokens) for name, tokens in recent.items()]
        recent[decide(views, number=number).prefill] += 1600

    assert set(recent.values()) == {16_000.0}


def test_a_page_in_common_does_not_gather_all_requests() -> None:
    # 16 of 1600 tokens are worth 1 % of the whole prompt.
    one_page = holding("p0", 1, recent_tokens=1600)

    decision = decide([one_page, PrefillView(name="p1")])

    assert decision.prefill == "p1"
    assert decision.reason == "equals: sent the fewest tokens lately, the longest match is 16 tokens"


def test_long_queues_do_not_make_a_good_match_an_equal() -> None:
    # Both wait for a minute, of which 5 % is three seconds; the match saves 4 * 0.4.
    decision = decide([holding("p0", 25, wait_s=60, recent_tokens=9), PrefillView(name="p1", wait_s=60)])

    assert decision.prefill == "p0"


def test_equals_in_everything_do_not_all_go_to_the_first_name() -> None:
    views = [PrefillView(name=name) for name in ("p0", "p1", "p2")]

    counts = dict.fromkeys(("p0", "p1", "p2"), 0)
    for number in range(300):
        counts[decide(views, number=number).prefill] += 1

    assert min(counts.values()) > 60


def test_the_same_request_with_the_same_seed_goes_the_same_way() -> None:
    views = [PrefillView(name=name) for name in ("p0", "p1", "p2")]

    def chosen(views: list[PrefillView], seed: int) -> list[str]:
        return [decide(views, number=number, seed=seed).prefill for number in range(50)]

    assert chosen(views, seed=7) == chosen(views[::-1], seed=7)
    assert chosen(views, seed=7) != chosen(views, seed=8)


def test_a_hot_prefix_is_copied_to_the_cheapest_worker_that_does_not_hold_it() -> None:
    def with_users(users: int) -> Decision:
        hot = holding("p0", 90, sharing_requests=users)
        return decide([hot, PrefillView(name="p1", wait_s=1), PrefillView(name="p2", wait_s=0.5)])

    assert with_users(2).prefill == "p0"
    assert with_users(3).prefill == "p2"
    assert with_users(3).reason == "copied: 3 requests use what 1 worker held"


def test_two_holders_carry_twice_as_many_users_before_a_third_gets_a_copy() -> None:
    def third(users: int) -> str:
        hot = [holding("p0", 90, sharing_requests=users), holding("p1", 90, recent_tokens=1)]
        return decide([*hot, PrefillView(name="p2")]).prefill

    assert third(4) == "p0"
    assert third(5) == "p2"


def test_a_copy_that_is_not_worth_its_work_is_not_made() -> None:
    # 1,600 tokens are more than copy_tokens allows for each of three users; for users enough they are not.
    long = COST.model_copy(update={"copy_tokens": 500})

    def decision(users: int) -> str:
        return decide([holding("p0", 90, sharing_requests=users), PrefillView(name="p1")], cost=long).prefill

    assert decision(3) == "p0"
    assert decision(4) == "p1"


def test_where_nobody_holds_anything_an_idle_worker_goes_before_one_that_was_sent_less_lately() -> None:
    idle = PrefillView(name="p0", recent_tokens=5000)
    busy = PrefillView(name="p1", wait_s=0.05)

    assert decide([idle, busy]).prefill == "p0"
    assert decide([holding("p0", 1, recent_tokens=5000), busy]).prefill == "p1"


def test_costs_of_any_size_leave_a_pair() -> None:
    exact = COST.model_copy(update={"tie_fraction": 0.0, "prefill_tokens_per_s": 3.7, "context_halving_tokens": 1e3})
    for prompt_tokens in range(1_000, 10_000_000, 123_457):
        views = [PrefillView(name=f"p{number}", wait_s=0.1 * number) for number in range(3)]
        assert decide(views, prompt_tokens=prompt_tokens, cost=exact).prefill == "p0"


def test_a_short_match_makes_nothing_hot() -> None:
    assert decide([holding("p0", 40, sharing_requests=50), PrefillView(name="p1")]).prefill == "p0"


def test_the_decode_worker_with_fewer_requests_is_taken() -> None:
    busy = DecodeView(name="d0", running_requests=60)

    assert decide([PrefillView(name="p0")], [busy, DecodeView(name="d1")]).decode == "d1"


def test_pages_that_decode_holds_are_not_transferred_again() -> None:
    slow = COST.model_copy(update={"handoff_bytes_per_s": 1000.0, "tie_fraction": 0.0})  # a second a page

    decision = decide(
        [PrefillView(name="p0")], [D0, DecodeView(name="d1", held_pages=40, running_requests=3)], cost=slow
    )

    assert decision.decode == "d1"
    assert [candidate.transfer_ms for candidate in decision.candidates] == [60_000, 100_000]


def test_the_terms_of_every_pair_are_reported_and_add_up() -> None:
    decision = decide(
        [PrefillView(name="p0", wait_s=0.1), holding("p1", 50)],
        [D0, DecodeView(name="d1", running_requests=2)],
    )

    assert len(decision.candidates) == 4
    for one in decision.candidates:
        assert one.cost_ms == pytest.approx(one.wait_ms + one.prefill_ms + one.transfer_ms + one.pressure_ms, abs=0.01)
    waits = {(one.prefill, one.decode): (one.wait_ms, one.prefill_ms, one.pressure_ms) for one in decision.candidates}
    assert waits["p0", "d1"] == (100, 6400, 40)
    assert waits["p1", "d0"] == (0, 3200, 0)


def test_of_thousands_of_pairs_the_cheapest_and_the_chosen_one_are_reported() -> None:
    prefills = [PrefillView(name=f"p{number}", recent_tokens=100 - number) for number in range(64)]
    decodes = [DecodeView(name=f"d{number}", inflight_tokens=100 - number) for number in range(64)]

    decision = decide(prefills, decodes)

    assert (decision.prefill, decision.decode) == ("p63", "d63")
    assert len(decision.candidates) == SHOWN_CANDIDATES + 1
    assert (decision.candidates[-1].prefill, decision.candidates[-1].decode) == ("p63", "d63")


def test_a_worker_that_does_both_is_paired_with_itself_alone() -> None:
    decision = decide(
        [PrefillView(name="m0", alone=True), PrefillView(name="p0", wait_s=90)],
        [DecodeView(name="m0", alone=True), D0],
    )

    assert (decision.prefill, decision.decode) == ("m0", "m0")
    assert {(one.prefill, one.decode) for one in decision.candidates} == {("m0", "m0"), ("p0", "d0")}


def test_nobody_ready_is_said_with_numbers() -> None:
    with pytest.raises(NoWorker, match="0 can prefill, 1 can decode"):
        decide([], [D0])
    with pytest.raises(NoWorker, match="1 can prefill, 1 can decode"):
        decide([PrefillView(name="p0")], [DecodeView(name="m0", alone=True)])
