"""What an arm changes inside the gates and in what the model forgets, paired by setting, learning rate and seed.

Scores compare arms at their best rates. A mechanism is compared at equal rates, so that a lower rate is not taken for
it. A lower rate forgets less, and so does anything that shortens steps: an arm's forgetting is a gain only if the
baseline, at the rate where it forgets as much, has a higher test loss.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.study.report.comparison import Score, Table, parabola, score_of, sign_test


@dataclass(frozen=True)
class Mechanism:
    """An arm against the baseline at equal rates and seeds, over all settings.

    Attributes:
        pairs: Pairs of cells, both of which ended.
        misalignment: Mean over pairs of the arm's |Δρ| divided by the baseline's; NaN where it is not measured.
        less_misaligned: Pairs in which it is lower, and pairs that are not ties.
        forgetting: Mean difference of the rise of the held-out loss, nats per token.
        less_forgotten: Pairs in which it is lower, and pairs that are not ties.
        worse: Mean difference of the test loss, nats per token.
        walk: Norm of the rows of B of the least responsive tenth of channels (by |φ'|) divided by that of the most
            responsive tenth, at the end, mean over the arm's cells; NaN where it is not measured.
    """

    pairs: int
    misalignment: float
    less_misaligned: tuple[int, int]
    forgetting: float
    less_forgotten: tuple[int, int]
    worse: float
    walk: float


def _walk(result: Mapping[str, Any]) -> float | None:
    norms = result["study_info"]["probes"][-1].get("row_norm")
    return norms["output"][0] / norms["output"][-1] if norms and norms["output"][-1] else None


def mechanisms(results: Iterable[Mapping[str, Any]], baseline: str) -> dict[str, Mechanism]:
    """Every arm, the baseline first."""
    cells: dict[str, dict[tuple[str, float, int], Score]] = {}
    walks: dict[str, list[float]] = {}
    for result in results:
        config = result["run_info"]["train_config"]
        if result["train_info"]["status"] != "success":
            continue
        score = score_of(result, "last")
        cells.setdefault(config["arm_name"], {})[config["setting"], config["rate"], config["seed"]] = score
        if (ratio := _walk(result)) is not None:
            walks.setdefault(config["arm_name"], []).append(ratio)
    reference = cells.get(baseline, {})
    found = {}
    for arm in sorted(cells, key=lambda name: (name != baseline, name)):
        pairs = [(score, reference[key]) for key, score in cells[arm].items() if key in reference]
        if not pairs:
            continue
        moved = [
            (own.misalignment, other.misalignment)
            for own, other in pairs
            if own.misalignment is not None and other.misalignment
        ]
        forgotten = [own.forgetting - other.forgetting for own, other in pairs]
        found[arm] = Mechanism(
            pairs=len(pairs),
            misalignment=mean(own / other for own, other in moved) if moved else math.nan,
            less_misaligned=sign_test([own - other for own, other in moved])[:2],
            forgetting=mean(forgotten),
            less_forgotten=sign_test(forgotten)[:2],
            worse=mean(own.test - other.test for own, other in pairs),
            walk=mean(walks[arm]) if arm in walks else math.nan,
        )
    return found


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
