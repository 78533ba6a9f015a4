"""Fit against forgetting: what an arm's test loss is worth once plain LoRA is allowed to forget as little.

A lower learning rate forgets less, and so does anything that shortens steps. An arm's forgetting is a gain only if the
baseline, at the learning rate where it forgets as much, has a higher test loss.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from benchmarks.study.report.comparison import Score, Table, parabola, score_of

_POINTS = 2001


def at_equal_forgetting(
    results: Iterable[Mapping[str, Any]], table: Table, baseline: str
) -> dict[tuple[str, str], dict[int, float]]:
    """Test loss minus the baseline's at the learning rate at which the baseline forgets as much, by seed.

    Between the baseline's learning rates its forgetting and its test loss are those of the parabolas through its best
    rate and the neighbours.

    Args:
        results: All results.
        table: What :func:`benchmarks.study.report.comparison.compare` made of them.
        baseline: Arm to compare with.

    Returns:
        Differences by (setting, arm). Seeds are left out for which the baseline's three rates do not reach as much or
        as little forgetting, or do not forget the more the higher they are; arms without a seed are left out.
    """
    curves: dict[tuple[str, int], dict[float, Score]] = defaultdict(dict)
    for result in results:
        config = result["run_info"]["train_config"]
        if config["arm_name"] == baseline and result["train_info"]["status"] == "success":
            curves[config["setting"], config["seed"]][config["rate"]] = score_of(result, "last")
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
