"""Constants are recovered from noisy streams, and nonsense among the observations does not move them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from router.fit import MEAN_WINDOW, WINDOW, RobustFit, RobustMean, SureRatio

PRIOR = (0.05, 4.0, 0.5)
POINTS = [(1.0, 0.001, 0.0000005), (1.0, 1.0, 0.5), (1.0, 8.0, 32.0)]
"""Features of prompts of 1, 1000 and 8000 tokens."""
PROMPTS = [(100, 100), (500, 4000), (2000, 2000), (8000, 8000), (3000, 20000), (16000, 16000)]
"""Uncached tokens and context of prompts that tell three constants apart."""


def features(uncached: float, context: float) -> tuple[float, float, float]:
    return 1.0, uncached / 1e3, uncached * (context - uncached / 2) / 1e6


def value(constants: Sequence[float], row: Sequence[float]) -> float:
    return sum(constant * feature for constant, feature in zip(constants, row, strict=True))


def stream(
    constants: Sequence[float], count: int, rng: np.random.Generator, *, noise: float = 0.0
) -> list[tuple[tuple[float, ...], float]]:
    """Observations of random prompts, each too long or too short by about `noise`."""
    found: list[tuple[tuple[float, ...], float]] = []
    for _ in range(count):
        uncached = 10 ** rng.uniform(1, 4.2)
        row = features(uncached, uncached + 10 ** rng.uniform(0, 4.2))
        found.append((row, value(constants, row) * float(np.exp(noise * rng.standard_normal()))))
    return found


def fitted(observations: Sequence[tuple[Sequence[float], float]]) -> RobustFit:
    fit = RobustFit(PRIOR, POINTS)
    for row, seconds in observations:
        fit.learn(row, seconds)
    return fit


def worst_error(found: Sequence[float], true: Sequence[float]) -> float:
    """Largest relative error of what the constants predict for the prompts above."""
    rows = [features(*prompt) for prompt in PROMPTS]
    return max(abs(value(found, row) / value(true, row) - 1) for row in rows)


positive = st.tuples(st.floats(0.001, 0.5), st.floats(0.01, 5), st.floats(0.001, 0.5))
seeds = st.integers(0, 2**32 - 1)


def test_it_begins_with_what_was_configured() -> None:
    fit = RobustFit(PRIOR, POINTS)

    assert fit.constants == PRIOR
    assert fit.observed == 0


@settings(max_examples=10, deadline=None)
@given(positive, seeds)
def test_constants_are_recovered_from_a_clean_stream(true: tuple[float, ...], seed: int) -> None:
    fit = fitted(stream(true, WINDOW, np.random.default_rng(seed)))

    assert worst_error(fit.constants, true) < 0.01
    assert fit.observed == WINDOW


@settings(max_examples=10, deadline=None)
@given(positive, seeds, st.sampled_from([1 / 100, 1 / 10, 10.0, 100.0]))
def test_a_tenth_of_nonsense_does_not_move_what_the_rest_agree_on(
    true: tuple[float, ...], seed: int, nonsense: float
) -> None:
    rng = np.random.default_rng(seed)
    observations = stream(true, WINDOW, rng, noise=0.1)
    for place in rng.choice(WINDOW, WINDOW // 10, replace=False):
        row, seconds = observations[place]
        observations[place] = row, seconds * nonsense

    assert worst_error(fitted(observations).constants, true) < 0.25


def test_a_tenth_of_nonsense_in_both_directions_is_ignored_too() -> None:
    true, rng = (0.03, 0.5, 0.05), np.random.default_rng(1)
    observations = stream(true, WINDOW, rng, noise=0.05)
    for turn, place in enumerate(rng.choice(WINDOW, WINDOW // 10, replace=False)):
        row, _ = observations[place]
        observations[place] = row, (0.0005, 300.0)[turn % 2]

    assert worst_error(fitted(observations).constants, true) < 0.2


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(PROMPTS), st.floats(1e-6, 1e6)),
        min_size=1,
        max_size=32,
    )
)
@example([((100, 100), 79523.0), ((500, 4000), 26673.0), ((3000, 20000), 1.0), ((500, 4000), 395155.0)])
def test_no_constant_is_ever_negative_or_infinite(observations: list[tuple[tuple[int, int], float]]) -> None:
    fit = RobustFit(PRIOR, POINTS)
    for prompt, seconds in observations:
        fit.learn(features(*prompt), seconds)

        assert all(0 <= constant < np.inf for constant in fit.constants), fit.constants
        assert any(fit.constants)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(PROMPTS), st.floats(1e-3, 1e3), st.integers(8, 200))
def test_a_stream_of_equals_predicts_itself_and_nothing_absurd_elsewhere(
    prompt: tuple[int, int], factor: float, count: int
) -> None:
    row = features(*prompt)
    seconds = value(PRIOR, row) * factor
    fit = fitted([(row, seconds)] * count)

    assert value(fit.constants, row) == pytest.approx(seconds, rel=0.25)
    # One kind of prompt cannot tell the constants apart; none may pay for it by more than the stream says.
    for constant, feature in zip(fit.constants, row, strict=True):
        assert constant * feature <= seconds * 1.25


def test_a_drift_is_followed_within_the_window() -> None:
    before, after, rng = (0.05, 4.0, 0.5), (0.02, 1.0, 0.1), np.random.default_rng(2)
    fit = fitted(stream(before, 3 * WINDOW, rng, noise=0.1))
    assert worst_error(fit.constants, before) < 0.1

    for row, seconds in stream(after, WINDOW, rng, noise=0.1):
        fit.learn(row, seconds)

    assert worst_error(fit.constants, after) < 0.1


def test_one_observation_that_is_nonsense_is_outvoted_by_the_next_seven() -> None:
    true, rng = (0.05, 4.0, 0.5), np.random.default_rng(3)
    first = (features(200, 200), 60.0)

    assert worst_error(fitted([first, *stream(true, 7, rng, noise=0.05)]).constants, true) < 0.5


def test_a_constant_whose_prior_is_zero_is_found_too() -> None:
    rng = np.random.default_rng(4)
    fit = RobustFit((0.0, 0.02), [(1.0, 1.0), (1.0, 16.0)])
    for running in rng.integers(0, 16, 128):
        fit.learn((1.0, float(running)), (0.8 + 0.1 * running) * float(np.exp(0.05 * rng.standard_normal())))

    assert fit.constants == pytest.approx((0.8, 0.1), rel=0.1)


def test_a_mean_moves_from_its_prior_to_the_median_of_the_last_ones() -> None:
    mean = RobustMean(1.0)
    assert mean.value == 1.0

    mean.learn(9.0)
    assert mean.value == pytest.approx(9 ** (1 / 8))  # an eighth of the way, in proportion

    for _ in range(7):
        mean.learn(9.0)
    assert mean.value == 9.0

    for _ in range(MEAN_WINDOW // 2 + 1):
        mean.learn(3.0)
    assert mean.value == 3.0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.9, 1.1), min_size=21, max_size=60), seeds)
def test_a_tenth_of_nonsense_does_not_move_a_mean_out_of_the_others_range(values: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    mean = RobustMean(1.0)
    for place, one in enumerate(values):
        if place % 10 == 5:
            mean.learn(float(10 ** rng.uniform(-6, 6)))
        mean.learn(one)

    assert min(values) <= mean.value <= max(values)


@given(st.integers(0, 10_000), st.floats(0.05, 0.5))
def test_equal_workers_are_hardly_ever_told_apart_by_noise(seed: int, noise: float) -> None:
    chance = random.Random(seed)
    told_apart = 0
    for _ in range(20):
        ratio = SureRatio()
        for _ in range(31):
            ratio.learn(math.exp(chance.gauss(0, noise)))
        told_apart += ratio.value != 1.0
    assert told_apart <= 5


@pytest.mark.parametrize("truth", [0.5, 1.3, 2.0, 7.0])
def test_a_worker_that_is_truly_slower_or_faster_is_known_as_such(truth: float) -> None:
    chance, ratio = random.Random(1), SureRatio()
    for _ in range(7):
        ratio.learn(truth)
        assert ratio.value == 1.0
    for _ in range(31):
        ratio.learn(truth * math.exp(chance.gauss(0, 0.1)))
    assert ratio.value == pytest.approx(truth, rel=0.1)
