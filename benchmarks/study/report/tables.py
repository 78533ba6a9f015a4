"""The kinds of tables that the pages of evidence may ask for: how arms compare, and what that cost."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.study.report.comparison import (
    Score,
    Table,
    Verdict,
    bootstrap_interval,
    compare,
    parabola,
    score_of,
    sign_test,
    verdicts,
)

BASELINE = "lora"
_POINTS = 2001
_VERDICT_HEAD = ["arm", "settings", "test loss, % of baseline", "95 % interval", "better", "p", "p (Holm)", "time"]
Rows = list[list[str]]
Found = tuple[list[str], Rows]
Results = list[dict[str, Any]]


@dataclass(frozen=True)
class Study:
    """What of all cells is a study: names of arms and settings, and seeds."""

    arms: Sequence[str]
    settings: Sequence[str]
    seeds: Sequence[int]

    def has(self, config: Mapping[str, Any]) -> bool:
        """Whether the cell of a ``train_config`` is one of it, whatever its learning rate."""
        names = config["setting"] in self.settings and config["arm_name"] in self.arms
        return names and config["seed"] in self.seeds


class Sources:
    """Studies and their results.

    Args:
        results: All results.
        studies: ``studies`` of studies.yaml.
    """

    def __init__(self, results: Iterable[dict[str, Any]], studies: Mapping[str, Mapping[str, Any]]) -> None:
        every = list(results)
        self.studies = {name: Study(**options) for name, options in studies.items()}
        self.results: Callable[[str], Results] = cache(
            lambda name: [one for one in every if self.studies[name].has(one["run_info"]["train_config"])]
        )
        # A study's arms at their best learning rates, interpolated.
        self.table: Callable[[str], Table] = cache(lambda name: compare(self.results(name), BASELINE, interpolate=True))


def shown(value: float, digits: int = 4, sign: bool = False) -> str:
    """A number for a table: a dash where it was not measured, a word where it is infinite."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "diverged"
    # Adding zero makes a rounded -0.0 a plain zero, which has no direction.
    return f"{round(value, digits) + 0.0:{'+' if sign else ''}.{digits}f}"


def _verdict_rows(found: Mapping[str, Verdict]) -> Rows:
    """One row for each arm: pooled over settings."""
    return [
        [
            arm,
            str(one.settings),
            shown(one.relative, 2, sign=True),
            f"{shown(one.interval[0], 2, sign=True)} … {shown(one.interval[1], 2, sign=True)}",
            f"{one.better}/{one.pairs}",
            f"{one.p_value:.3f}",
            f"{one.adjusted:.3f}",
            shown(one.time, 2),
        ]
        for arm, one in found.items()
    ]


def at_equal_forgetting(
    results: Iterable[Mapping[str, Any]], table: Table, baseline: str
) -> dict[tuple[str, str], dict[int, float]]:
    """Test loss minus the baseline's at the learning rate at which the baseline forgets as much, by seed.

    A lower rate forgets less, and so does anything that shortens steps: an arm's forgetting is a gain only if the
    baseline, where it forgets as much, has a higher test loss.

    Between the baseline's learning rates its forgetting and its test loss are those of the parabolas through its best
    rate and the neighbours.

    Args:
        results: All results.
        table: What :func:`~benchmarks.study.report.comparison.compare` made of them.
        baseline: Arm to compare with.

    Returns:
        Differences by (setting, arm). Seeds are left out for which the baseline's three rates do not reach as much or
        as little forgetting, or do not forget the more the higher they are; arms without a seed are left out.
    """
    curves: dict[tuple[str, int], dict[float, Score]] = defaultdict(dict)
    for result in results:
        config = result["run_info"]["train_config"]
        if config["arm_name"] == baseline and result["train_info"]["status"] == "success":
            curves[config["setting"], config["seed"]][config["rate"]] = score_of(result)
    found: dict[tuple[str, str], dict[int, float]] = {}
    for setting, arms in table.items():
        reference = arms.get(baseline)
        if reference is None:
            continue
        for arm, own in arms.items():
            pairs = {
                seed: score.test - expected
                for seed, score in own.scores.items()
                if seed in reference.scores
                and (expected := _expected(curves[setting, seed], reference.rate, score.forgetting)) is not None
            }
            if arm != baseline and pairs:
                found[setting, arm] = pairs
    return found


def _expected(curve: Mapping[float, Score], best: float, forgetting: float) -> float | None:
    """The baseline's test loss where it forgets this much; None outside of what it forgets at its three rates."""
    rates = sorted(curve)
    index = rates.index(best) if best in curve else 0
    near = rates[index - 1 : index + 2] if index else []
    if len(near) < 3 or not math.isfinite(forgetting):
        return None
    places = np.log(near)
    fine = np.linspace(places[0], places[-1], _POINTS)
    level = parabola(places, [curve[rate].forgetting for rate in near], fine)
    if not level.min() <= forgetting <= level.max() or not (np.diff(level) > 0).all():
        return None
    at = float(np.interp(forgetting, level, fine))
    return float(parabola(places, [curve[rate].test for rate in near], at))


def _percent(differences: Mapping[int, float], level: float) -> list[float]:
    return [100.0 * value / level for value in differences.values()]


def _level(arms: Mapping[str, Any], seeds: Sequence[int]) -> float:
    return mean(arms[BASELINE].scores[seed].test for seed in seeds)


def _interval(strata: Sequence[Sequence[float]]) -> str:
    lower, upper = bootstrap_interval(strata)
    return f"{shown(lower, 2, sign=True)} … {shown(upper, 2, sign=True)}"


def pooled(sources: Sources, study: str) -> Found:
    """One row for each arm, over all settings."""
    return _VERDICT_HEAD, _verdict_rows(verdicts(sources.table(study), BASELINE))


def by_setting(sources: Sources, study: str) -> Found:
    """Per arm and setting: difference of test losses in percent of the baseline's, its interval, pairs that are better.

    The last row is the baseline's own test loss and number of seeds.
    """
    table = sources.table(study)
    rows = []
    for arm in verdicts(table, BASELINE):
        row = [arm]
        for own in table.values():
            differences = own[arm].differences if arm in own else {}
            if not differences or not all(map(math.isfinite, differences.values())):
                row.append("–")
                continue
            values = _percent(differences, _level(own, list(differences)))
            better, pairs, _ = sign_test(values)
            edge = "!" if own[arm].at_edge or own[BASELINE].at_edge else ""
            spread = f" ({_interval([values])}) {better}/{pairs}" if len(values) > 1 else ""
            row.append(f"{shown(mean(values), 2, sign=True)}{edge}{spread}")
        rows.append(row)
    rows.append(
        [
            f"{BASELINE}, nats",
            *(
                f"{shown(one.average('test'))} at {one.bottom:.2g}, {len(one.scores)} seeds"
                for one in (own[BASELINE] for own in table.values())
            ),
        ]
    )
    return ["arm", *table], rows


def pairs(sources: Sources, study: str, pairs: Sequence[Sequence[str]]) -> Found:
    """Arms against each other: each of ``pairs`` is an arm and the one that it is compared with."""
    rows = []
    for pair in pairs:
        arm, against = pair
        own = [result for result in sources.results(study) if result["run_info"]["train_config"]["arm_name"] in pair]
        (row,) = _verdict_rows(verdicts(compare(own, against, interpolate=True), against))
        rows.append([f"{arm} against {against}", *row[1:6]])
    return ["pair", "settings", "difference, %", "95 % interval", "better", "p"], rows


def equal_forgetting(sources: Sources, study: str) -> Found:
    """Forgetting at the best learning rate, and the test loss against the baseline's where that forgets as much."""
    table = sources.table(study)
    found = at_equal_forgetting(sources.results(study), table, BASELINE)
    rows = []
    for arm in sorted({arm for _, arm in found}):
        own = {setting: found[setting, arm] for setting in table if (setting, arm) in found}
        strata = [_percent(values, _level(table[setting], list(values))) for setting, values in own.items()]
        forgotten = [
            table[setting][arm].scores[seed].forgetting - table[setting][BASELINE].scores[seed].forgetting
            for setting, values in own.items()
            for seed in values
        ]
        better, count, p_value = sign_test([value for stratum in strata for value in stratum])
        rows.append(
            [
                arm,
                str(len(own)),
                shown(mean(forgotten), 3, sign=True),
                shown(mean(map(mean, strata)), 2, sign=True),
                _interval(strata),
                f"{better}/{count}",
                f"{p_value:.3f}",
            ]
        )
    head = ["arm", "settings", "forgetting − baseline, nats", "test loss at equal forgetting, %"]
    return [*head, "95 % interval", "better", "p"], rows


def one_rate(sources: Sources, study: str, setting: str, rates: Sequence[float], arms: Sequence[str]) -> Found:
    """Test loss against the baseline's at the same learning rate, for some rates: what an untuned comparison says."""
    losses: dict[tuple[str, float], dict[int, float]] = defaultdict(dict)
    for result in sources.results(study):
        config = result["run_info"]["train_config"]
        if config["setting"] == setting and result["train_info"]["status"] == "success":
            losses[config["arm_name"], config["rate"]][config["seed"]] = score_of(result).test
    rows = []
    for arm in arms:
        row = [arm]
        for rate in rates:
            base, own = losses[BASELINE, rate], losses[arm, rate]
            values = [100.0 * (own[seed] / base[seed] - 1.0) for seed in sorted(own.keys() & base.keys())]
            better, pairs, _ = sign_test(values)
            row.append(f"{shown(mean(values), 2, sign=True)} {better}/{pairs}" if values else "–")
        rows.append(row)
    bases = [shown(mean(own.values())) if (own := losses[BASELINE, rate]) else "–" for rate in rates]
    return ["arm", *(f"{rate:g}" for rate in rates)], [*rows, [f"{BASELINE}, nats", *bases]]


def exact(sources: Sources, study: str, settings: Sequence[str]) -> Found:
    """Percent of test answers without a wrong token, at the rate of the lowest validation loss, mean over seeds."""
    table = {name: own for name, own in compare(sources.results(study), BASELINE).items() if name in settings}
    names = dict.fromkeys(arm for own in table.values() for arm in sorted(own, key=lambda arm: (arm != BASELINE, arm)))
    rows = [
        [arm, *(shown(100 * own[arm].average("accuracy"), 1) if arm in own else "–" for own in table.values())]
        for arm in names
    ]
    return ["arm", *table], rows


def cost(sources: Sources, studies: Sequence[str]) -> Found:
    """Cells of each study and their processor time, cells of several studies counted once, with the first."""
    counted: set[str] = set()
    rows = []
    for name in studies:
        new = {
            result["run_info"]["experiment_name"]: result["train_info"]["metrics"][-1]
            for result in sources.results(name)
            if result["run_info"]["experiment_name"] not in counted
        }
        counted |= set(new)
        hours = sum(last["train time"] + last["eval time"] for last in new.values()) / 3600
        rows.append([name, str(len(sources.studies[name].arms)), str(len(new)), shown(hours, 2)])
    return ["study", "arms", "cells", "hours of one core"], rows


KINDS: dict[str, Callable[..., Found]] = {
    "pooled": pooled,
    "by_setting": by_setting,
    "pairs": pairs,
    "equal_forgetting": equal_forgetting,
    "one_rate": one_rate,
    "exact": exact,
    "cost": cost,
}
