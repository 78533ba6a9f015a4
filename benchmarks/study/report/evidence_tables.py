"""The kinds of tables that a document of evidence may ask for: how arms compare, and what that cost."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.study.report.comparison import Table, bootstrap_interval, compare, score_of, sign_test, verdicts
from benchmarks.study.report.mechanism import at_equal_forgetting
from benchmarks.study.report.summary import VERDICT_HEAD, Rows, shown, verdict_rows
from benchmarks.study.run.specification import Study, load_study, results_of

BASELINE = "lora"
Found = tuple[list[str], Rows]
Results = list[dict[str, Any]]


class Sources:
    """Studies and their results.

    Args:
        results: All results.
        studies: Folder of study files.
    """

    def __init__(self, results: Iterable[dict[str, Any]], studies: Path) -> None:
        self._all = list(results)
        self.study: Callable[[str], Study] = cache(lambda name: load_study(studies / f"{name}.yaml"))
        self.results: Callable[[str], Results] = cache(lambda name: results_of(self.study(name), self._all))
        # A study's arms at their best learning rates, interpolated.
        self.table: Callable[[str], Table] = cache(lambda name: compare(self.results(name), BASELINE, interpolate=True))


def _percent(differences: Mapping[int, float], level: float) -> list[float]:
    return [100.0 * value / level for value in differences.values()]


def _level(arms: Mapping[str, Any], seeds: Sequence[int]) -> float:
    return mean(arms[BASELINE].scores[seed].test for seed in seeds)


def _interval(strata: Sequence[Sequence[float]]) -> str:
    lower, upper = bootstrap_interval(strata)
    return f"{shown(lower, 2, sign=True)} … {shown(upper, 2, sign=True)}"


def pooled(sources: Sources, study: str) -> Found:
    """One row for each arm, over all settings."""
    return VERDICT_HEAD, verdict_rows(verdicts(sources.table(study), BASELINE))


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
        (row,) = verdict_rows(verdicts(compare(own, against, interpolate=True), against))
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
            losses[config["arm_name"], config["rate"]][config["seed"]] = score_of(result, "last").test
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
        rows.append([name, str(len(sources.study(name).arms)), str(len(new)), shown(hours, 2)])
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
