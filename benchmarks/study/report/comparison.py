"""Compares the arms of a study from its results alone.

Per setting and arm the learning rate is the one of the lowest validation loss, averaged over seeds; the score is what
the cells of that rate got on the test set. Differences from the baseline are paired by seed.

A grid of learning rates is coarse: an arm that shortens steps sees the curve of losses at other points than the
baseline does, and may look better for that alone. ``interpolate`` therefore compares the arms at the bottom of a
parabola through the best rate and its neighbours; forgetting and misalignment are those of the same place.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import numpy as np
from scipy.stats import binomtest

_FEWEST = 3
_CURVES = ("valid", "test", "forgetting", "misalignment")


@dataclass(frozen=True)
class Score:
    """What one cell got.

    Attributes:
        valid: Validation loss, infinite where the cell diverged.
        test: Test loss, likewise.
        accuracy: Share of test answers without a wrong token.
        forgetting: Rise of the loss on held-out documentation, nats per token.
        misalignment: Mean |Δρ| over gates; None where it was not measured.
        seconds: Training time.
    """

    valid: float
    test: float
    accuracy: float
    forgetting: float
    misalignment: float | None
    seconds: float


def score_of(result: Mapping[str, Any]) -> Score:
    """Score of a cell at its last interval."""
    metrics = result["train_info"]["metrics"]
    lost = result["train_info"]["status"] != "success"
    entry = metrics[-1]
    probes = {probe["step"]: probe for probe in result["study_info"]["probes"]}
    moved = [value for value in probes[entry["step"]].get("misalignment", ()) if value is not None]
    return Score(
        valid=math.inf if lost else entry["valid loss"],
        test=math.inf if lost else entry["test loss"],
        accuracy=0.0 if lost else entry["test accuracy"],
        forgetting=math.inf if lost else entry["held-out loss"] - metrics[0]["held-out loss"],
        misalignment=mean(moved) if moved else None,
        seconds=result["train_info"]["train_time"],
    )


@dataclass(frozen=True)
class ArmInSetting:
    """An arm in one setting, at its best learning rate.

    Attributes:
        rate: That rate.
        bottom: The rate at the bottom of the parabola, where scores are interpolated; else the same.
        at_edge: Whether it is the lowest or highest that was tried.
        scores: By seed.
        differences: Test loss minus the baseline's, by seed, for the seeds that both have.
    """

    rate: float
    bottom: float
    at_edge: bool
    scores: Mapping[int, Score]
    differences: Mapping[int, float]

    def average(self, name: str) -> float:
        """Mean of an attribute of :class:`Score` over seeds; NaN where it was not measured."""
        values = [getattr(score, name) for score in self.scores.values()]
        return math.nan if any(value is None for value in values) else mean(values)


@dataclass(frozen=True)
class Verdict:
    """An arm against the baseline over all settings.

    Attributes:
        settings: Number of settings in which both were run.
        relative: Mean over settings of the mean difference of test losses, in percent of the baseline's loss.
        interval: Bootstrap interval of it.
        better: Pairs in which the arm's test loss is lower.
        pairs: Pairs that are not ties.
        p_value: Of the sign test.
        adjusted: That p-value by Holm over all arms.
        time: Mean ratio of training times.
    """

    settings: int
    relative: float
    interval: tuple[float, float]
    better: int
    pairs: int
    p_value: float
    adjusted: float
    time: float


Table = dict[str, dict[str, ArmInSetting]]


def compare(results: Iterable[Mapping[str, Any]], baseline: str, interpolate: bool = False) -> Table:
    """Arms by setting, each at its best learning rate.

    For an arm those learning rates count that have the most seeds. While less than three do, those with at least half
    as many count too, and of the seeds those that all these rates have.
    """
    cells: dict[str, dict[str, dict[float, dict[int, Score]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(dict))
    )
    for result in results:
        config = result["run_info"]["train_config"]
        by_seed = cells[config["setting"]][config["arm_name"]][config["rate"]]
        by_seed[config["seed"]] = score_of(result)
    table: Table = {}
    for setting, by_arm in sorted(cells.items()):
        chosen = {arm: found for arm, by_rate in by_arm.items() if (found := _best(by_rate, interpolate)) is not None}
        reference = chosen.get(baseline)
        table[setting] = {}
        for arm, one in chosen.items():
            common = sorted(set(one.scores) & set(reference.scores)) if reference else []
            paired = {seed: one.scores[seed].test - reference.scores[seed].test for seed in common} if reference else {}
            table[setting][arm] = replace(one, differences=paired)
    return table


def _best(by_rate: Mapping[float, Mapping[int, Score]], interpolate: bool) -> ArmInSetting | None:
    most = max(map(len, by_rate.values()))
    whole = {rate: scores for rate, scores in by_rate.items() if len(scores) == most}
    # A rate that was added to the grid and has only begun, or that a wider and shorter study left, does not count.
    by_rate = whole if len(whole) >= _FEWEST else {rate: own for rate, own in by_rate.items() if 2 * len(own) >= most}
    seeds = sorted(set.intersection(*(set(scores) for scores in by_rate.values())))
    if not seeds:
        return None
    rates = sorted(by_rate)
    valid = [mean(by_rate[rate][seed].valid for seed in seeds) for rate in rates]
    index = valid.index(min(valid))
    scores = {seed: by_rate[rates[index]][seed] for seed in seeds}
    at_edge = index in (0, len(rates) - 1)
    near = slice(index - 1, index + 2)
    if at_edge or not interpolate or not all(map(math.isfinite, valid[near])):
        return ArmInSetting(rates[index], rates[index], at_edge, scores, {})
    places = np.log(rates[near])
    bottom = _bottom(places, valid[near])
    for seed, score in scores.items():
        near_scores = [by_rate[rate][seed] for rate in rates[near]]
        curves = {name: [getattr(one, name) for one in near_scores] for name in _CURVES}
        between = {name: float(parabola(places, own, bottom)) for name, own in curves.items() if None not in own}
        scores[seed] = replace(score, **between)
    return ArmInSetting(rates[index], math.exp(bottom), at_edge, scores, {})


def parabola(x: np.ndarray, y: Sequence[float], at: np.ndarray | float) -> Any:
    """Values at ``at`` of the parabola through three points."""
    return np.polyval(np.polyfit(x - x[1], y, 2), at - x[1])


def _bottom(x: np.ndarray, y: Sequence[float]) -> float:
    """Where the parabola through three points, the middle one the lowest, has its minimum."""
    curvature, slope, _ = np.polyfit(x - x[1], y, 2)
    return float(x[1] if curvature <= 0 else x[1] - slope / (2 * curvature))


def verdicts(table: Table, baseline: str) -> dict[str, Verdict]:
    """Every arm but the baseline, over the settings where both were run, best first."""
    found: dict[str, Verdict] = {}
    for arm in sorted({arm for arms in table.values() for arm in arms} - {baseline}):
        shared = [arms for arms in table.values() if arm in arms and arms[arm].differences]
        if not shared:
            continue
        strata = []
        for arms in shared:
            level = mean(arms[baseline].scores[seed].test for seed in arms[arm].differences)
            strata.append([100.0 * value / level for value in arms[arm].differences.values()])
        every = [value for stratum in strata for value in stratum]
        finite = all(map(math.isfinite, every))
        better, pairs, p_value = sign_test(every)
        found[arm] = Verdict(
            settings=len(shared),
            relative=mean(map(mean, strata)) if finite else math.inf,
            interval=bootstrap_interval(strata) if finite else (math.nan, math.inf),
            better=better,
            pairs=pairs,
            p_value=p_value,
            adjusted=1.0,
            time=mean(arms[arm].average("seconds") / arms[baseline].average("seconds") for arms in shared),
        )
    adjusted = holm([verdict.p_value for verdict in found.values()])
    final = {
        arm: replace(verdict, adjusted=value) for (arm, verdict), value in zip(found.items(), adjusted, strict=True)
    }
    return dict(sorted(final.items(), key=lambda entry: entry[1].relative))


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
