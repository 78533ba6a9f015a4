"""What an arm changes inside the gates and in what the model forgets, paired by setting, learning rate and seed.

Scores compare arms at their best rates. A mechanism is compared at equal rates, so that a lower rate is not taken for
it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.study.report.comparison import Score, score_of
from benchmarks.study.report.paired import sign_test


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
