"""The kinds of tables that a document of evidence may ask for: what arms do to the gates' selection."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from statistics import mean
from typing import Any

from scipy.stats import spearmanr

from benchmarks.study.report.comparison import score_of
from benchmarks.study.report.evidence_tables import BASELINE, Found, Sources
from benchmarks.study.report.mechanism import mechanisms
from benchmarks.study.report.summary import MECHANISM_HEAD, mechanism_rows, shown

# Its frozen part is another, so that what its selection moves from is not what that of the other arms moves from.
_MOVES_FROM_ELSEWHERE = "pissa"


def mechanism(sources: Sources, study: str) -> Found:
    """What an arm does to selection, forgetting and test loss at equal learning rates and seeds."""
    return MECHANISM_HEAD, mechanism_rows(mechanisms(sources.results(study), BASELINE))


def _at_best_rates(sources: Sources, study: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Setting, arm and result of the cells at their arm's best learning rate of the grid."""
    table = sources.table(study)
    for result in sources.results(study):
        config = result["run_info"]["train_config"]
        own = table[config["setting"]].get(config["arm_name"])
        if own is not None and config["rate"] == own.rate:
            yield config["setting"], config["arm_name"], result


def layers(sources: Sources, study: str, arm: str = BASELINE) -> Found:
    """Selection misalignment of an arm at its best learning rate by layer: mean |Δρ|, and the selection's share."""
    measured: dict[str, list[tuple[list[float], list[float]]]] = defaultdict(list)
    for setting, name, result in _at_best_rates(sources, study):
        last = result["study_info"]["probes"][-1]
        if name == arm and "share" in last:
            measured[setting].append((last["misalignment"], last["share"]))
    rows = []
    for setting, seen in sorted(measured.items()):
        row = [setting]
        for index in range(len(seen[0][0])):
            moved, share = (mean(one[kind][index] for one in seen) for kind in (0, 1))
            row.append(f"{shown(moved, 4)} ({shown(100 * share, 0)} %)")
        rows.append(row)
    depth = max(len(row) for row in rows) - 1 if rows else 0
    return ["setting", *(f"layer {index}" for index in range(depth))], [
        row + [""] * (depth + 1 - len(row)) for row in rows
    ]


def _correlation(first: Sequence[float], second: Sequence[float]) -> float:
    constant = len(set(first)) < 2 or len(set(second)) < 2
    return math.nan if constant else float(spearmanr(first, second).statistic)


def selection(sources: Sources, study: str) -> Found:
    """Selection misalignment of each arm at its own best learning rate, divided by the baseline's at its own.

    The last row is Spearman's correlation over arms of this with the test loss. PiSSA is left out.
    """
    table = sources.table(study)
    measured: dict[tuple[str, str], list[float]] = defaultdict(list)
    for setting, arm, result in _at_best_rates(sources, study):
        moved = score_of(result, "last").misalignment if result["train_info"]["status"] == "success" else None
        if moved is not None:
            measured[setting, arm].append(moved)
    ratios = {
        setting: {
            arm: mean(measured[setting, arm]) / mean(measured[setting, BASELINE])
            for arm in own
            if arm != _MOVES_FROM_ELSEWHERE and measured[setting, arm]
        }
        for setting, own in table.items()
    }
    arms = sorted({arm for own in ratios.values() for arm in own}, key=lambda arm: (arm != BASELINE, arm))
    rows = [[arm, *(shown(own[arm], 2) if arm in own else "–" for own in ratios.values())] for arm in arms]
    with_loss = [
        _correlation(list(own.values()), [table[setting][arm].average("test") for arm in own])
        for setting, own in ratios.items()
    ]
    rows.append(["correlation with test loss", *(shown(value, 2, sign=True) for value in with_loss)])
    return ["arm", *ratios], rows


def correlations(sources: Sources, study: str) -> Found:
    """Spearman's correlation of selection misalignment with forgetting and test loss.

    Over plain LoRA's cells of all learning rates, where a longer step raises all three; and over all arms at one
    learning rate and seed, as differences from plain LoRA, where it is asked whether an arm that moves selection less
    forgets less.
    """
    cells: dict[tuple[str, float, int], dict[str, Any]] = defaultdict(dict)
    for result in sources.results(study):
        config = result["run_info"]["train_config"]
        if result["train_info"]["status"] == "success":
            score = score_of(result, "last")
            if score.misalignment is not None:
                cells[config["setting"], config["rate"], config["seed"]][config["arm_name"]] = score
    rows = []
    for setting in sorted({key[0] for key in cells}):
        plain = [own[BASELINE] for key, own in cells.items() if key[0] == setting and BASELINE in own]
        moved = [
            (
                score.misalignment - own[BASELINE].misalignment,
                score.forgetting - own[BASELINE].forgetting,
                score.test - own[BASELINE].test,
            )
            for key, own in cells.items()
            if key[0] == setting and BASELINE in own
            for arm, score in own.items()
            if arm not in (BASELINE, _MOVES_FROM_ELSEWHERE)
        ]
        across = [
            _correlation([one.misalignment for one in plain], [getattr(one, name) for one in plain])
            for name in ("forgetting", "test")
        ]
        within = [_correlation([one[0] for one in moved], [one[kind] for one in moved]) for kind in (1, 2)]
        numbers = [shown(value, 2, sign=True) for value in (*across, *within)]
        rows.append([setting, str(len(plain)), *numbers[:2], str(len(moved)), *numbers[2:]])
    head = ["setting", "cells of LoRA", "|Δρ| and forgetting", "|Δρ| and test loss", "pairs with LoRA"]
    return [*head, "Δ|Δρ| and Δforgetting", "Δ|Δρ| and Δtest loss"], rows


KINDS: dict[str, Callable[..., Found]] = {
    "mechanism": mechanism,
    "layers": layers,
    "selection": selection,
    "correlations": correlations,
}
