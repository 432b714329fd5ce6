"""What a choice costs, with its arithmetic, and how its constants follow what requests took."""

from __future__ import annotations

import numpy as np
import pytest

from router.config import CostConfig
from router.cost import MAX_SPEED, SETTLED, CostModel, Work

CONFIG = CostConfig(
    prefill_overhead_s=0.05,
    prefill_tokens_per_s=1000,
    context_halving_tokens=8000,
    handoff_bytes_per_s=1e9,
    page_bytes=1_000_000,
    decode_request_s=0.02,
)
SPEEDS = {"p0": 1.0, "p1": 1.0, "p2": 3.0, "p3": 1.0}


def run(model: CostModel, speeds: dict[str, float], count: int, *, nonsense: bool = False) -> None:
    """Each worker computes `count` prompts as configured, but for its speed and a tenth of noise."""
    rng, truth = np.random.default_rng(1), CostModel(CONFIG)
    for turn in range(count):
        for name, slowness in speeds.items():
            uncached = int(10 ** rng.uniform(1.5, 4))
            work = Work.of(uncached, uncached + int(rng.integers(0, 8000)))
            seconds = slowness * truth.work_s("", work) * float(np.exp(0.1 * rng.standard_normal()))
            model.learn_prefill(name, work, 500.0 if nonsense and turn % 10 == 4 else seconds)


def test_a_prefill_is_its_overhead_its_tokens_and_what_they_attend_to() -> None:
    model = CostModel(CONFIG)

    assert model.prefill_s("p0", 0, 4000) == pytest.approx(0.05)
    # 2000 tokens whose middle is at 3000: each costs 1 + 3000 / 8000 milliseconds.
    assert model.prefill_s("p0", 2000, 4000) == pytest.approx(0.05 + 2 * (1 + 3 / 8))
    assert model.prefill_s("p0", 4000, 4000) == pytest.approx(0.05 + 4 * (1 + 2 / 8))


def test_work_adds_up_whatever_it_is_split_into() -> None:
    model = CostModel(CONFIG)
    first, second = Work.of(2000, 4000), Work.of(500, 500)

    both_s = model.prefill_s("p0", 2000, 4000) + model.prefill_s("p0", 500, 500)
    assert model.work_s("p0", first.plus(second)) == pytest.approx(both_s)
    # The same tokens in two requests cost one overhead more, and nothing else.
    halves = Work.of(2000, 2000).plus(Work.of(2000, 4000))
    assert model.work_s("p0", halves) == pytest.approx(0.05 + model.work_s("p0", Work.of(4000, 4000)))


def test_a_page_takes_its_bytes_over_the_bandwidth_and_pressure_grows_with_the_batch() -> None:
    model = CostModel(CONFIG)

    assert model.page_s("p0", "d0") == pytest.approx(0.001)
    assert model.pressure_s(0) == 0
    assert model.pressure_s(5) == pytest.approx(0.1)


def test_seconds_and_tokens_are_told_from_each_other() -> None:
    assert CostModel(CONFIG).tokens_in(1.5) == 1500


def test_a_slow_worker_is_found_slow_and_the_others_are_not() -> None:
    model = CostModel(CONFIG)
    run(model, SPEEDS, 60)

    slowness = dict(model.slowness())
    usual = np.median(list(slowness.values()))
    for name, slower in SPEEDS.items():
        assert slowness[name] / usual == pytest.approx(slower, rel=0.2)
        expected_s = slower * CostModel(CONFIG).prefill_s("", 3000, 6000)
        assert model.prefill_s(name, 3000, 6000) == pytest.approx(expected_s, rel=0.25)


def test_a_fleet_that_is_not_as_configured_is_found_out_and_nobody_in_it_is_called_slow() -> None:
    model = CostModel(CONFIG)
    run(model, dict.fromkeys(SPEEDS, 0.1), 60, nonsense=True)

    constants = dict(model.constants())
    assert constants["prefill_tokens_per_s"] == pytest.approx(10_000, rel=0.3)
    assert all(slowness == pytest.approx(1, rel=0.2) for _, slowness in model.slowness())
    assert model.observed_prefills == 240


def test_a_worker_whose_first_prefill_takes_for_ever_is_not_called_slow_for_it() -> None:
    cold, settled = CostModel(CONFIG), CostModel(CONFIG)
    cold.learn_prefill("p0", Work.of(1000, 1000), 50.0)
    run(settled, {"p1": 1.0, "p2": 1.0}, SETTLED)
    settled.learn_prefill("p0", Work.of(1000, 1000), 50.0)

    assert dict(cold.slowness()) == {}
    assert dict(settled.slowness())["p0"] == 1


def test_nobody_is_believed_to_be_slow_without_bound() -> None:
    model = CostModel(CONFIG)
    for _ in range(4):
        model.learn_prefill("p0", Work.of(1000, 1000), 1.2)
    run(model, {"p1": 1.0, "p2": 1.0, "p3": 1.0}, 20)
    for _ in range(40):
        model.learn_prefill("p0", Work.of(1000, 1000), 1e6)

    assert dict(model.slowness())["p0"] == MAX_SPEED


def test_bandwidth_is_learned_for_each_pair_and_strangers_are_expected_to_be_usual() -> None:
    model = CostModel(CONFIG)
    for _ in range(31):
        model.learn_transfer("p0", "d0", 10_000_000, 0.1)  # 100 MB/s
        model.learn_transfer("p1", "d0", 10_000_000, 0.001)
        model.learn_transfer("p1", "d1", 10_000_000, 0.001)

    assert model.page_s("p0", "d0") == pytest.approx(0.01)
    assert model.page_s("p1", "d0") == pytest.approx(0.0001)
    assert model.page_s("p9", "d9") == pytest.approx(0.0001)
    assert model.knows_bandwidths
    assert {(prefill, decode): rate for prefill, decode, rate in model.bandwidths()} == pytest.approx(
        {("p0", "d0"): 1e8, ("p1", "d0"): 1e10, ("p1", "d1"): 1e10}
    )


def test_what_a_neighbour_costs_is_learned_from_requests_that_decoded() -> None:
    model = CostModel(CONFIG)
    for running in list(range(16)) * 8:
        model.learn_decode(running, 0.008 + 0.001 * running, 100)

    assert model.pressure_s(1) == pytest.approx(0.1, rel=0.1)


def test_a_name_that_is_forgotten_begins_anew() -> None:
    model = CostModel(CONFIG)
    run(model, SPEEDS, 30)
    for _ in range(8):
        model.learn_transfer("p2", "d0", 10_000_000, 0.1)
        model.learn_transfer("p0", "d0", 10_000_000, 0.001)
        model.learn_transfer("p0", "p2", 10_000_000, 0.5)
    model.forget("p2")

    assert "p2" not in dict(model.slowness())
    assert model.prefill_s("p2", 1000, 1000) == model.prefill_s("", 1000, 1000)
    assert [(prefill, decode) for prefill, decode, _ in model.bandwidths()] == [("p0", "d0")]


def test_nothing_is_learned_where_that_is_switched_off_or_the_observation_says_nothing() -> None:
    fixed = CostModel(CONFIG.model_copy(update={"learn": False}))
    run(fixed, SPEEDS, 5)
    fixed.learn_transfer("p0", "d0", 1000, 1.0)
    fixed.learn_decode(3, 1.0, 100)
    silent = CostModel(CONFIG)
    silent.learn_prefill("p0", Work.of(1000, 1000), 0.0)
    silent.learn_transfer("p0", "d0", 0, 1.0)
    silent.learn_transfer("p0", "d0", 1000, 0.0)
    silent.learn_decode(3, 1.0, 1)

    for model in (fixed, silent):
        assert dict(model.constants()) == dict(CostModel(CONFIG).constants())
        assert not dict(model.slowness())
        assert not list(model.bandwidths())


def test_a_few_observations_of_short_prompts_say_little_of_long_ones() -> None:
    model = CostModel(CostConfig())
    seen = [(658, 658, 3.5), (16, 656, 0.77), (16, 656, 0.8), (27, 683, 0.98), (41, 697, 1.09), (31, 687, 0.96)]
    for uncached, context, seconds in [*seen, (36, 708, 1.05), (50, 738, 1.07)]:
        model.learn_prefill("p0", Work.of(uncached, context), seconds)

    assert model.prefill_s("", 30, 700) == pytest.approx(1.0, rel=0.2)
    assert 20 < model.prefill_s("", 8000, 8000) < 100  # by the same few it might be 250
