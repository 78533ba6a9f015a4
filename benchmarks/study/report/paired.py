"""Statistics of paired differences: bootstrap intervals and the sign test."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import binomtest


def bootstrap_interval(
    strata: Sequence[Sequence[float]], level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of paired differences.

    Args:
        strata: Differences by seed, one sequence for each setting. Seeds are drawn with replacement within each
            setting, and the statistic is the mean over settings of their mean differences.
        level: Coverage aimed at. With fewer than about eight pairs in all the interval is too narrow.
        draws: Bootstrap samples.
        seed: Of the random draws.

    Returns:
        Lower and upper end; NaN where no setting has more than one pair, of which nothing can be said.
    """
    if all(len(differences) < 2 for differences in strata):
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    means = np.zeros(draws)
    for differences in strata:
        values = np.asarray(differences, dtype=float)
        means += values[generator.integers(len(values), size=(draws, len(values)))].mean(axis=1)
    tail = (1.0 - level) / 2.0
    lower, upper = np.quantile(means / len(strata), [tail, 1.0 - tail])
    return float(lower), float(upper)


def sign_test(differences: Sequence[float]) -> tuple[int, int, float]:
    """Exact two-sided sign test; ties are left out.

    Returns:
        Number of negative differences, number of differences that are not zero, and the p-value (1 without any).
    """
    negative = sum(value < 0 for value in differences)
    untied = sum(value != 0 for value in differences)
    return negative, untied, float(binomtest(negative, untied).pvalue) if untied else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment of p-values for testing all of them at once, in their order."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
