"""Coefficients from measurements: exact ones, noisy ones, outliers, changes."""

from __future__ import annotations

import random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.step_times.regression import OnlineRegression

TRUE = (0.01, 2e-4, 3e-8)
GUESS = (0.005, 1e-4, 0.0)


def features(rng: random.Random) -> tuple[float, float, float]:
    n = round(50 * 160 ** rng.random())
    return 1.0, n, n * (rng.randint(0, 4000) + n / 2)


def seconds(true: tuple[float, ...], x: tuple[float, ...]) -> float:
    return sum(c * value for c, value in zip(true, x, strict=True))


def learn(regression: OnlineRegression, true: tuple[float, ...], num: int, rng: random.Random, noise: float) -> None:
    for _ in range(num):
        x = features(rng)
        regression.add(x, seconds(true, x) * rng.gauss(1.0, noise))


def worst_error(regression: OnlineRegression, true: tuple[float, ...]) -> float:
    """Over prompts of all sizes."""
    sizes = [(1.0, n, n * (c + n / 2)) for n in (100, 1000, 4000, 8000) for c in (0, 4000)]
    return max(abs(regression.predict(x) / seconds(true, x) - 1) for x in sizes)


def test_exact_measurements_give_the_coefficients() -> None:
    regression = OnlineRegression(GUESS)
    learn(regression, TRUE, 200, random.Random(1), noise=0.0)
    assert regression.coefficients == pytest.approx(TRUE, rel=0.05)


@pytest.mark.parametrize("factor", [0.01, 0.1, 10.0, 100.0])
def test_a_guess_may_be_wrong_by_any_factor(factor: float) -> None:
    regression = OnlineRegression([factor * value for value in TRUE])
    learn(regression, TRUE, 50, random.Random(2), noise=0.05)
    assert worst_error(regression, TRUE) < 0.15


def test_before_the_first_measurement_the_guess_counts() -> None:
    assert OnlineRegression(GUESS).predict((1.0, 1000, 0.0)) == pytest.approx(0.105)


@pytest.mark.parametrize("factor", [0.0, 0.1, 10.0, 1000.0])
def test_an_outlier_changes_little(factor: float) -> None:
    regression = OnlineRegression(GUESS)
    learn(regression, TRUE, 100, random.Random(3), noise=0.03)
    x = (1.0, 2000, 2e6)
    regression.add(x, factor * seconds(TRUE, x))
    assert worst_error(regression, TRUE) < 0.15


def test_where_times_vary_the_mean_is_right() -> None:
    regression, rng = OnlineRegression(GUESS), random.Random(5)
    ratios = []
    for index in range(2000):
        x = features(rng)
        true = seconds(TRUE, x)
        if index >= 100:
            ratios.append(regression.predict(x) / true)
        regression.add(x, true * rng.choice((0.7, 1.3)))
    assert fmean(ratios) == pytest.approx(1.0, abs=0.03)


def test_one_measurement_in_ten_may_be_ten_times_too_long() -> None:
    regression, rng = OnlineRegression(GUESS), random.Random(4)
    for index in range(300):
        x = features(rng)
        regression.add(x, seconds(TRUE, x) * (10.0 if index % 10 == 9 else rng.gauss(1.0, 0.03)))
    assert worst_error(regression, TRUE) < 0.3


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.3, 2.0, 10.0])
def test_a_lasting_change_is_learnt_within_fifty_measurements(factor: float) -> None:
    regression, rng = OnlineRegression(GUESS), random.Random(5)
    learn(regression, TRUE, 200, rng, noise=0.03)
    changed = tuple(factor * value for value in TRUE)
    learn(regression, changed, 50, rng, noise=0.03)
    assert worst_error(regression, changed) < 0.15


def test_what_does_not_vary_any_more_is_kept() -> None:
    regression, rng = OnlineRegression(GUESS), random.Random(6)
    learn(regression, TRUE, 100, rng, noise=0.02)
    x = (1.0, 500, 125_000.0)
    for _ in range(1000):
        regression.add(x, seconds(TRUE, x) * rng.gauss(1.0, 0.02))
    assert worst_error(regression, TRUE) < 0.2


sample = st.tuples(st.integers(1, 20_000), st.integers(0, 20_000), st.floats(0.0, 1e4))


@given(st.lists(sample, max_size=60))
def test_coefficients_are_finite_and_never_negative(samples: list[tuple[int, int, float]]) -> None:
    regression = OnlineRegression(GUESS)
    for n, context, took_s in samples:
        regression.add((1.0, n, n * (context + n / 2)), took_s)
        assert all(0.0 <= value < 1e9 for value in regression.coefficients)
