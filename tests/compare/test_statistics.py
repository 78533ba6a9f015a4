"""The statistics of ``na-lora compare`` against simulation: how often they err, and what they find."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from na_lora_lightning.compare.statistics import (
    detectable,
    estimate,
    holm,
    mean_and_error,
    record_interval,
)

COMPARISONS = 1000
# Three standard deviations of a share of 5 % among a thousand.
TOLERANCE = 3 * math.sqrt(0.05 * 0.95 / COMPARISONS)


def simulated(tasks: int, seeds: int, mean: float = 0.0, seed: int = 0) -> list[list[list[float]]]:
    """Comparisons whose tasks differ in how far their seeds spread; differences in per cent."""
    generator = np.random.default_rng(seed)
    spread = np.array([0.4, 0.8, 1.2, 0.6])[:tasks, None]
    return (mean + spread * generator.standard_normal((COMPARISONS, tasks, seeds))).tolist()


@pytest.mark.parametrize(("tasks", "seeds"), [(1, 3), (1, 5), (4, 3), (4, 5)])
def test_without_a_difference_the_interval_leaves_zero_out_as_often_as_it_says(tasks: int, seeds: int) -> None:
    found = [estimate(sample) for sample in simulated(tasks, seeds)]
    missed = np.mean([each.low > 0 or each.high < 0 for each in found])
    assert missed == np.mean([each.p_value < 0.05 for each in found])
    # Satterthwaite's degrees of freedom err to the safe side.
    assert 0.02 < missed < 0.05 + TOLERANCE
    assert tasks > 1 or missed > 0.05 - TOLERANCE


@pytest.mark.parametrize(("tasks", "seeds"), [(1, 5), (4, 3), (4, 5)])
def test_without_a_difference_the_sign_test_is_wrong_no_more_often_than_it_says(tasks: int, seeds: int) -> None:
    found = [estimate(sample) for sample in simulated(tasks, seeds)]
    pairs = tasks * seeds
    # Of a test with few outcomes the error rate is known exactly.
    negatives = np.arange(pairs + 1)
    p_values = np.array([stats.binomtest(int(k), pairs).pvalue for k in negatives])
    exact = stats.binom.pmf(negatives, pairs, 0.5)[p_values < 0.05].sum()
    wrong = np.mean([each.sign_p < 0.05 for each in found])
    assert exact <= 0.05
    assert abs(wrong - exact) < TOLERANCE
    assert [each.sign_p for each in found[:50]] == [pytest.approx(p_values[each.negative]) for each in found[:50]]


def test_holm_keeps_the_error_of_a_whole_table() -> None:
    arms = [[estimate(sample).sign_p for sample in simulated(4, 5, seed=arm)] for arm in range(6)]
    wrong = np.mean([min(holm(list(p_values))) < 0.05 for p_values in zip(*arms, strict=True)])
    unadjusted = np.mean([min(p_values) < 0.05 for p_values in zip(*arms, strict=True)])
    assert wrong < 0.05
    assert unadjusted > 0.1
    assert holm([0.01, 0.04, 0.03, math.nan]) == [
        pytest.approx(0.03),
        pytest.approx(0.06),
        pytest.approx(0.06),
        pytest.approx(math.nan, nan_ok=True),
    ]


def test_a_difference_of_one_per_cent_is_found_as_often_as_is_said() -> None:
    samples = simulated(4, 5, mean=-1.0)
    spread = math.sqrt(sum(s**2 for s in (0.4, 0.8, 1.2, 0.6)) / 5) / 4
    freedom = np.median([estimate(sample).freedom for sample in samples])
    # With a mean of the size that is detected in 80 % of all cases.
    reach = detectable(spread, freedom)
    assert 0.5 < reach < 1
    scaled = [[[value + 1.0 - reach for value in task] for task in sample] for sample in samples]
    assert np.mean([estimate(sample).high < 0 for sample in scaled]) == pytest.approx(0.8, abs=0.05)
    assert np.mean([estimate(sample).high < 0 for sample in samples]) > 0.95
    # What is said of a comparison is right on the average too.
    assert np.median([estimate(sample).detectable for sample in samples]) == pytest.approx(reach, rel=0.1)


def test_arms_at_the_margin_are_called_equal_in_one_case_of_twenty() -> None:
    at_margin = np.mean([estimate(sample).is_within(0.5) for sample in simulated(1, 20, mean=0.5)])
    assert at_margin == pytest.approx(0.05, abs=TOLERANCE)
    assert np.mean([estimate(sample).is_within(0.5) for sample in simulated(1, 40)]) > 0.9


def test_the_interval_over_records_holds_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    records, held = 120, 0
    for number in range(200):
        tokens = generator.integers(5, 30, records)
        baseline = tokens * generator.gamma(4.0, 0.25, records)
        # The other arm loses 2 % on the average record, more on some.
        arm = baseline * 1.02 + tokens * 0.1 * generator.standard_normal(records)
        low, high = record_interval([(arm[None], baseline[None], tokens)], seed=number, draws=500)
        held += low < 2.0 < high
    assert held / 200 == pytest.approx(0.95, abs=0.05)
    assert record_interval([(arm[None], baseline[None], tokens)]) == record_interval(
        [(arm[None], baseline[None], tokens)]
    )


def test_few_pairs_say_nothing_rather_than_something_wrong() -> None:
    single = estimate([[1.0]])
    assert single.mean == 1.0
    assert all(math.isnan(value) for value in (single.low, single.high, single.p_value, single.detectable))
    assert not single.is_within(5.0)
    assert math.isnan(estimate([]).mean)
    equal = estimate([[0.0, 0.0], [0.0, 0.0]])
    assert (equal.low, equal.high, equal.p_value, equal.sign_p) == (0.0, 0.0, 1.0, 1.0)
    assert equal.is_within(0.1)


def test_the_mean_over_tasks_weighs_tasks_alike() -> None:
    mean, error, freedom = mean_and_error([np.array([1.0, 3.0]), np.array([10.0, 10.0, 10.0, 10.0])])
    assert mean == 6.0
    assert error == pytest.approx(math.sqrt(2.0 / 2) / 2)
    assert freedom == pytest.approx(1.0)
