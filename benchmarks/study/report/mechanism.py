"""What an arm changes inside the gates and in what the model forgets, paired by setting, learning rate and seed.

Scores compare arms at their best rates. A mechanism is compared at equal rates, so that a lower rate is not taken for
it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from scipy.stats import spearmanr

from benchmarks.study.report.comparison import Score, score_of, sign_test
from benchmarks.study.report.tables import BASELINE, Found, Rows, Sources, shown

_HEAD = [
    "arm",
    "pairs",
    "|Δρ| ÷ baseline",
    "lower",
    "forgetting − baseline",
    "lower",
    "test loss − baseline",
    "silent ÷ responsive rows",
]
# Its frozen part is another, so that what its selection moves from is not what that of the other arms moves from.
_MOVES_FROM_ELSEWHERE = "pissa"


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
        score = score_of(result)
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


def _mechanism_rows(found: Mapping[str, Mechanism]) -> Rows:
    """One row for each arm: what it changes at equal rates and seeds."""
    return [
        [
            arm,
            str(one.pairs),
            shown(one.misalignment, 3),
            "/".join(map(str, one.less_misaligned)),
            shown(one.forgetting, 4, sign=True),
            "/".join(map(str, one.less_forgotten)),
            shown(one.worse, 4, sign=True),
            shown(one.walk, 3),
        ]
        for arm, one in found.items()
    ]


def mechanism(sources: Sources, study: str) -> Found:
    """What an arm does to selection, forgetting and test loss at equal learning rates and seeds."""
    return _HEAD, _mechanism_rows(mechanisms(sources.results(study), BASELINE))


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
        moved = score_of(result).misalignment if result["train_info"]["status"] == "success" else None
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
            score = score_of(result)
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
