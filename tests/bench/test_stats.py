"""Statistics of the bench: intervals that cover, pairs that cancel drift."""

from __future__ import annotations

import numpy as np
import pytest

from pytq.bench.stats import NOISY_SPREAD, is_noisy, ratio_of_medians, spread


def test_ratio_of_constants_has_no_width() -> None:
    found = ratio_of_medians([20, 20, 20], [10, 10, 10])
    assert (found.value, found.low, found.high) == (2, 2, 2)


def test_few_rounds_have_no_interval() -> None:
    found = ratio_of_medians([20, 22], [10, 10])
    assert found.value == 2.1 and found.low is None and found.high is None


def test_drift_that_hits_both_cancels() -> None:
    """Both slow down by half over the rounds; the ratio of medians stays 1.5 with a narrow interval."""
    drift = np.linspace(1, 0.5, 9)
    found = ratio_of_medians(150 * drift, 100 * drift)
    assert found.value == pytest.approx(1.5)
    assert found.low == pytest.approx(1.5) and found.high == pytest.approx(1.5)


def test_interval_covers_the_truth() -> None:
    """The 95 % interval holds the true ratio in most of 200 experiments (nominal 190; percentile intervals of 11
    rounds run a little short: at least 175)."""
    rng = np.random.default_rng(3)
    hits = 0
    for seed in range(200):
        a, b = 130 * rng.lognormal(0, 0.05, 11), 100 * rng.lognormal(0, 0.05, 11)
        found = ratio_of_medians(a, b, resamples=999, seed=seed)
        assert found.low is not None and found.high is not None
        hits += found.low <= 1.3 <= found.high
    assert hits >= 175


def test_same_input_same_interval() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random(7) + 1, rng.random(7) + 1
    assert ratio_of_medians(a, b) == ratio_of_medians(a, b)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], []), ([1, 2, 0], [1, 1, 1]), ([1, 1, 1], [1, -1, 1])])
def test_nonsense_is_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        ratio_of_medians(a, b)


def test_noise() -> None:
    assert not is_noisy([100, 101, 99, 100, 100.5])
    assert is_noisy([100, 140, 80, 100, 60])
    assert not is_noisy([100])
    assert spread([90, 100, 110]) == pytest.approx(0.1) and spread([90, 100, 110]) > NOISY_SPREAD
