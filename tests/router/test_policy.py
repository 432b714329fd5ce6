"""Choices between pairs, with their arithmetic."""

from __future__ import annotations

import pytest

from router.config import CostConfig
from router.cost import prefill_seconds
from router.policy import Decision, DecodeView, NoWorker, PrefillView, choose, usable_tokens

COST = CostConfig(
    alpha=4,
    prefill_overhead_s=0,
    prefill_tokens_per_s=1000,
    context_halving_tokens=1e12,  # every token costs 1 ms
    handoff_bytes_per_s=1e9,
    page_bytes=1000,
    decode_request_s=0.02,
)
D0 = DecodeView(name="d0")


def decide(
    prefills: list[PrefillView],
    decodes: list[DecodeView] | None = None,
    *,
    prompt_tokens: int = 1600,
    number: int = 0,
    seed: int = 0,
) -> Decision:
    return choose(
        prefills,
        decodes or [D0],
        prompt_tokens=prompt_tokens,
        page_tokens=16,
        cost=COST,
        seed=seed,
        number=number,
    )


def test_the_holder_of_the_prefix_gets_the_request() -> None:
    decision = decide([PrefillView(name="p0"), PrefillView(name="p1", held_pages=62)])

    assert decision.prefill == "p1"
    assert decision.matched_tokens == 992  # 62 pages of 16
    assert decision.uncached_tokens == 608
    assert decision.reason.startswith("cache: holds 992 tokens")


def test_a_prefix_is_worth_four_times_its_seconds_of_waiting() -> None:
    # 800 tokens cached save 4 * 0.8 s.
    def busy(outstanding: int) -> PrefillView:
        return PrefillView(name="p1", held_pages=50, outstanding_tokens=outstanding)

    assert decide([PrefillView(name="p0"), busy(2_700)]).prefill == "p1"
    assert decide([PrefillView(name="p0"), busy(3_800)]).prefill == "p0"


def test_a_long_queue_outweighs_the_cache_and_the_reason_says_so() -> None:
    decision = decide([PrefillView(name="p0"), PrefillView(name="p1", held_pages=50, outstanding_tokens=30_000)])

    assert decision.prefill == "p0"
    assert decision.cache_choice == "p1"
    assert decision.load_choice == "p0"
    assert decision.reason == "load: p1 holds 800 tokens but would wait 30000 ms"


def test_what_an_unsure_index_says_counts_half() -> None:
    sure = PrefillView(name="p0", held_pages=30)
    unsure = PrefillView(name="p1", held_pages=50, exact=False)

    assert decide([sure, unsure]).prefill == "p0"  # 480 against half of 800


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
    # 16 of 1600 tokens are worth 1 % of the cost.
    one_page = PrefillView(name="p0", held_pages=1, recent_tokens=1600)

    decision = decide([one_page, PrefillView(name="p1")])

    assert decision.prefill == "p1"
    assert decision.reason == "equals: sent the fewest tokens lately, the longest match is 16 tokens"


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


def test_the_decode_worker_with_fewer_requests_is_taken() -> None:
    busy = DecodeView(name="d0", running_requests=60)

    assert decide([PrefillView(name="p0")], [busy, DecodeView(name="d1")]).decode == "d1"


def test_pages_that_decode_holds_are_not_transferred_again() -> None:
    slow = COST.model_copy(update={"handoff_bytes_per_s": 1000.0, "tie_fraction": 0.0})  # a second a page

    decision = choose(
        [PrefillView(name="p0")],
        [D0, DecodeView(name="d1", held_pages=40, running_requests=3)],
        prompt_tokens=1600,
        page_tokens=16,
        cost=slow,
        seed=0,
        number=0,
    )

    assert decision.decode == "d1"
    assert [candidate.transfer_ms for candidate in decision.candidates] == [100_000, 60_000]


def test_the_terms_of_every_pair_are_reported_and_add_up() -> None:
    decision = decide(
        [PrefillView(name="p0", outstanding_tokens=100), PrefillView(name="p1", held_pages=50)],
        [D0, DecodeView(name="d1", running_requests=2)],
    )

    assert len(decision.candidates) == 4
    for one in decision.candidates:
        assert one.cost_ms == pytest.approx(one.wait_ms + one.prefill_ms + one.transfer_ms + one.pressure_ms, abs=0.01)
    waits = {(one.prefill, one.decode): (one.wait_ms, one.prefill_ms, one.pressure_ms) for one in decision.candidates}
    assert waits["p0", "d1"] == (100, 6400, 40)
    assert waits["p1", "d0"] == (0, 3200, 0)


def test_a_worker_that_does_both_is_paired_with_itself_alone() -> None:
    both = PrefillView(name="m0", alone=True), DecodeView(name="m0", alone=True)

    decision = choose(
        [both[0], PrefillView(name="p0", outstanding_tokens=90_000)],
        [both[1], D0],
        prompt_tokens=1600,
        page_tokens=16,
        cost=COST,
        seed=0,
        number=0,
    )

    assert (decision.prefill, decision.decode) == ("m0", "m0")
    assert {(one.prefill, one.decode) for one in decision.candidates} == {("m0", "m0"), ("p0", "d0")}


def test_nobody_ready_is_said_with_numbers() -> None:
    with pytest.raises(NoWorker, match="0 can prefill, 1 can decode"):
        decide([], [D0])


def test_a_token_costs_twice_as_much_at_the_halving_length() -> None:
    config = COST.model_copy(update={"context_halving_tokens": 8000.0})

    assert prefill_seconds(1, 8000, config) == pytest.approx(0.002, rel=1e-3)
    whole = prefill_seconds(8000, 8000, config)
    halves = prefill_seconds(4000, 4000, config) + prefill_seconds(4000, 8000, config)
    assert whole == pytest.approx(halves)  # computing it in two parts costs the same
