"""Medians, confidence intervals of ratios, and signs of a noisy machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 9999
CONFIDENCE = 0.95
# spread of repeated runs (interquartile range over median) above which a row is called noisy
NOISY_SPREAD = 0.05
# share of the processors used by others before the start above which a run is called noisy
NOISY_LOAD = 0.15


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians with a percentile-bootstrap interval; no interval for fewer than three pairs."""

    value: float
    low: float | None
    high: float | None


def ratio_of_medians(
    ours: Sequence[float], base: Sequence[float], resamples: int = RESAMPLES, seed: int = 0
) -> Ratio:
    """``median(ours) / median(base)`` where ``ours[i]`` and ``base[i]`` were measured next to each other.

    Rounds are resampled as pairs (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 8), so drift that
    hits both builds alike cancels. Raises ValueError for empty or non-positive samples.
    """
    n = min(len(ours), len(base))
    a, b = np.asarray(ours[:n], float), np.asarray(base[:n], float)
    if n == 0 or (a <= 0).any() or (b <= 0).any():
        raise ValueError("samples must be positive and there must be some")
    value = float(np.median(a) / np.median(b))
    if n < 3:
        return Ratio(value, None, None)
    pick = np.random.default_rng(seed).integers(0, n, (resamples, n))
    ratios = np.median(a[pick], axis=1) / np.median(b[pick], axis=1)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(ratios, [tail, 100 - tail])
    return Ratio(value, float(low), float(high))


def spread(samples: Sequence[float]) -> float:
    """Interquartile range over the median; 0 for a single sample."""
    low, middle, high = np.percentile(np.asarray(samples, float), [25, 50, 75])
    return float((high - low) / middle) if middle else 0.0


def is_noisy(samples: Sequence[float]) -> bool:
    """True when repeated runs differ so much that small differences mean nothing."""
    return len(samples) > 1 and spread(samples) > NOISY_SPREAD
