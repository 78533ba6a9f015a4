"""Which differences are more than chance: paired differences by seed, over tasks.

A sample is given as strata, one for each task, of paired differences by seed. The estimate is the mean over tasks of
the mean over seeds, and its standard error follows from the spread of the seeds within each task::

    d̄ = (1/K) Σ_k d̄_k,   se² = (1/K²) Σ_k s_k² / n_k,   t = d̄ / se

with Welch's and Satterthwaite's degrees of freedom. Intervals are Student's: a bootstrap over three or five seeds is
too narrow (its 95 % interval of three holds the truth in 75 % of all cases at best). The bootstrap here draws test
records, whose number is large, and tells how far other records of the same kind might move the estimate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

Strata = Sequence[Sequence[float]]

_LEVEL = 0.95
_POWER = 0.8
_DRAWS = 4000


@dataclass(frozen=True)
class Estimate:
    """A mean difference and how far it can be trusted; all in the unit of the differences.

    Attributes:
        mean: Mean over tasks of the means over seeds.
        low: Lower end of the 95 % interval; NaN where no task has two pairs.
        high: Its upper end.
        p_value: Of Student's test that the mean is 0; NaN likewise.
        error: Standard error.
        freedom: Degrees of freedom.
        pairs: Number of pairs.
        negative: How many of them are below 0.
        sign_p: Of the exact two-sided sign test; pairs without a difference are left out.
    """

    mean: float
    low: float
    high: float
    p_value: float
    error: float
    freedom: float
    pairs: int
    negative: int
    sign_p: float

    @property
    def detectable(self) -> float:
        """The smallest difference that a test at 5 % finds in 80 % of all comparisons like this one."""
        return detectable(self.error, self.freedom)

    def is_within(self, margin: float) -> bool:
        """Whether two one-sided tests at 5 % show that the difference is smaller than the margin either way."""
        if math.isnan(self.low):
            return False
        reach = float(special.stdtrit(self.freedom, 0.95)) * self.error
        return -margin < self.mean - reach and self.mean + reach < margin


def estimate(strata: Strata) -> Estimate:
    """Estimates the mean difference of a sample."""
    kept = [np.asarray(values, dtype=float) for values in strata if len(values)]
    everything = np.concatenate(kept) if kept else np.empty(0)
    mean, error, freedom = mean_and_error(kept)
    if freedom > 0:
        reach = float(special.stdtrit(freedom, 0.5 + _LEVEL / 2)) * error
        p_value = float(2 * special.stdtr(freedom, -abs(mean) / error)) if error > 0 else float(mean == 0)
    else:
        reach = p_value = math.nan
    negative = int((everything < 0).sum())
    untied = int((everything != 0).sum())
    sign_p = min(1.0, 2 * float(special.bdtr(min(negative, untied - negative), untied, 0.5))) if untied else 1.0
    return Estimate(mean, mean - reach, mean + reach, p_value, error, freedom, len(everything), negative, sign_p)


def mean_and_error(strata: Sequence[NDArray[np.float64]]) -> tuple[float, float, float]:
    """Mean, standard error and degrees of freedom of a sample; 0 degrees where there is no spread to see."""
    if not strata:
        return math.nan, math.nan, 0.0
    mean = float(np.mean([values.mean() for values in strata]))
    if any(len(values) < 2 for values in strata):
        return mean, math.nan, 0.0
    parts = np.array([values.var(ddof=1) / len(values) for values in strata]) / len(strata) ** 2
    freedoms = np.array([len(values) - 1 for values in strata])
    total = float(parts.sum())
    if total == 0:
        return mean, 0.0, float(freedoms.sum())
    return mean, math.sqrt(total), total**2 / float((parts**2 / freedoms).sum())


def detectable(error: float, freedom: float, power: float = _POWER) -> float:
    """The smallest true difference that Student's test at 5 % finds with a given probability.

    Args:
        error: Standard error of the mean difference.
        freedom: Degrees of freedom, above 0.
        power: The probability.

    Returns:
        The difference, in the unit of the error; NaN without degrees of freedom.
    """
    if not freedom > 0 or math.isnan(error):
        return math.nan
    bound = float(special.stdtrit(freedom, 0.5 + _LEVEL / 2))

    def found(shift: float) -> float:
        return float(1 - special.nctdtr(freedom, shift, bound) + special.nctdtr(freedom, shift, -bound))

    low, high = 0.0, bound + 10.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if found(middle) < power else (low, middle)
    return high * error


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment of p-values for testing all of them at once, in their order; NaN stays NaN."""
    found = [index for index, value in enumerate(p_values) if not math.isnan(value)]
    adjusted = list(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(found, key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(found) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def record_interval(
    pairs: Sequence[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]], seed: int = 0, draws: int = _DRAWS
) -> tuple[float, float]:
    """Bootstrap interval of the mean relative difference over test records, the same draw for all seeds of a task.

    Args:
        pairs: For each task, the losses of the records with the one arm and with the other, each ``[seeds, records]``
            (sums over targets, nats), and the number of targets, ``[records]``.
        seed: Of the draws.
        draws: Their number.

    Returns:
        Lower and upper end of the 95 % percentile interval, in per cent; NaN without records.
    """
    if not pairs or any(not tokens.size for _, _, tokens in pairs):
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    means = np.zeros(draws)
    for arm, baseline, tokens in pairs:
        records = len(tokens)
        drawn = generator.multinomial(records, np.full(records, 1 / records), size=draws).astype(float)
        means += (100 * ((drawn @ arm.T) / (drawn @ baseline.T) - 1)).mean(axis=1)
    low, high = np.quantile(means / len(pairs), [0.5 - _LEVEL / 2, 0.5 + _LEVEL / 2])
    return float(low), float(high)
