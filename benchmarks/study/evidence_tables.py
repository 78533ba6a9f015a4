"""The kinds of tables that a document of evidence may ask for."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from scipy.stats import spearmanr

from benchmarks.study import result_files
from benchmarks.study.comparison import Table, When, compare, score_of, verdicts
from benchmarks.study.mechanism import mechanisms
from benchmarks.study.paired import bootstrap_interval, sign_test
from benchmarks.study.report import MECHANISM_HEAD, VERDICT_HEAD, Rows, mechanism_rows, shown, verdict_rows
from benchmarks.study.specification import Study, load_study
from benchmarks.study.tradeoff import at_equal_forgetting

Found = tuple[list[str], Rows]
Results = list[dict[str, Any]]


class Sources:
    """Studies and their results, each read once.

    Args:
        results: Folder of results.
        studies: Folder of study files.
    """

    def __init__(self, results: Path, studies: Path) -> None:
        self._studies = studies
        self._all = result_files.read_all(results)
        self.study: Callable[[str], Study] = cache(lambda name: load_study(studies / f"{name}.yaml"))

    def results(self, name: str, seeds: bool = True) -> Results:
        """Results of a study's settings and arms, of its seeds alone unless told not to."""
        study = self.study(name)
        wanted = {(setting.name, arm.name) for setting in study.settings for arm in study.arms}
        return [
            result
            for result in self._all
            if (config := result["run_info"]["train_config"]) is not None
            and (config["setting"], config["arm_name"]) in wanted
            and (config["seed"] in study.seeds or not seeds)
        ]

    def table(self, name: str, baseline: str = "lora", at: When = "last") -> Table:
        """A study's arms at their best learning rates, interpolated."""
        return compare(self.results(name), baseline, at, interpolate=True)


def _percent(differences: Mapping[int, float], level: float) -> list[float]:
    return [100.0 * value / level for value in differences.values()]


def _level(arms: Mapping[str, Any], baseline: str, seeds: Sequence[int]) -> float:
    return mean(arms[baseline].scores[seed].test for seed in seeds)


def _interval(strata: Sequence[Sequence[float]]) -> str:
    lower, upper = bootstrap_interval(strata)
    return f"{shown(lower, 2, sign=True)} … {shown(upper, 2, sign=True)}"


def pooled(
    sources: Sources,
    study: str,
    baseline: str = "lora",
    arms: Sequence[str] | None = None,
    without: Sequence[str] = (),
    at: When = "last",
) -> Found:
    """One row for each arm, over all settings; ``without`` leaves settings out. Holm adjusts for the arms shown."""
    table = {
        name: {arm: one for arm, one in own.items() if arms is None or arm in (*arms, baseline)}
        for name, own in sources.table(study, baseline, at).items()
        if name not in without
    }
    return VERDICT_HEAD, verdict_rows(verdicts(table, baseline))


def by_setting(sources: Sources, study: str, baseline: str = "lora", arms: Sequence[str] | None = None) -> Found:
    """Per arm and setting: difference of test losses in percent of the baseline's, its interval, pairs that are better.

    The last row is the baseline's own test loss and number of seeds.
    """
    table = sources.table(study, baseline)
    rows = []
    for arm in verdicts(table, baseline):
        if arms is not None and arm not in arms:
            continue
        row = [arm]
        for own in table.values():
            differences = own[arm].differences if arm in own else {}
            if not differences or not all(map(math.isfinite, differences.values())):
                row.append("–")
                continue
            values = _percent(differences, _level(own, baseline, list(differences)))
            better, pairs, _ = sign_test(values)
            edge = "!" if own[arm].at_edge or own[baseline].at_edge else ""
            spread = f" ({_interval([values])}) {better}/{pairs}" if len(values) > 1 else ""
            row.append(f"{shown(mean(values), 2, sign=True)}{edge}{spread}")
        rows.append(row)
    rows.append(
        [
            f"{baseline}, nats",
            *(
                f"{shown(one.average('test'))} at {one.bottom:.2g}, {len(one.scores)} seeds"
                for one in (own[baseline] for own in table.values())
            ),
        ]
    )
    return ["arm", *table], rows


def pairs(sources: Sources, study: str, pairs: Sequence[Sequence[str]]) -> Found:
    """Arms against each other: each of ``pairs`` is an arm and the one that it is compared with."""
    rows = []
    for arm, against in pairs:
        found = verdicts(sources.table(study, against), against).get(arm)
        if found is None:
            continue
        rows.append([f"{arm} against {against}", *verdict_rows({arm: found})[0][1:6]])
    return ["pair", "settings", "difference, %", "95 % interval", "better", "p"], rows


def mechanism(sources: Sources, study: str, baseline: str = "lora", arms: Sequence[str] | None = None) -> Found:
    """What an arm does to selection, forgetting and test loss at equal learning rates and seeds."""
    found = mechanisms(sources.results(study), baseline)
    kept = {arm: one for arm, one in found.items() if arms is None or arm in arms}
    return MECHANISM_HEAD, mechanism_rows(kept)


def equal_forgetting(sources: Sources, study: str, baseline: str = "lora", arms: Sequence[str] | None = None) -> Found:
    """Forgetting at the best learning rate, and the test loss against the baseline's where that forgets as much."""
    table = sources.table(study, baseline)
    found = at_equal_forgetting(sources.results(study), table, baseline)
    rows = []
    for arm in arms or sorted({arm for _, arm in found}):
        own = {setting: found[setting, arm] for setting in table if (setting, arm) in found}
        if not own:
            continue
        strata = [_percent(values, _level(table[setting], baseline, list(values))) for setting, values in own.items()]
        forgotten = [
            table[setting][arm].scores[seed].forgetting - table[setting][baseline].scores[seed].forgetting
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


def layers(sources: Sources, study: str, arm: str = "lora") -> Found:
    """Selection misalignment of an arm at its best learning rate by layer: mean |Δρ|, and the selection's share."""
    table = sources.table(study)
    measured: dict[str, list[tuple[list[float], list[float]]]] = defaultdict(list)
    for result in sources.results(study):
        config = result["run_info"]["train_config"]
        setting = config["setting"]
        last = result["study_info"]["probes"][-1]
        own = table[setting].get(arm)
        if config["arm_name"] == arm and own is not None and config["rate"] == own.rate and "share" in last:
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
        plain = [own["lora"] for key, own in cells.items() if key[0] == setting and "lora" in own]
        moved = [
            (
                score.misalignment - own["lora"].misalignment,
                score.forgetting - own["lora"].forgetting,
                score.test - own["lora"].test,
            )
            for key, own in cells.items()
            if key[0] == setting and "lora" in own
            for arm, score in own.items()
            if arm not in ("lora", "pissa")
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


def exact(sources: Sources, study: str, arms: Sequence[str] | None = None, settings: Sequence[str] = ()) -> Found:
    """Percent of test answers without a wrong token, at the rate of the lowest validation loss, mean over seeds."""
    table = {name: own for name, own in compare(sources.results(study), "lora").items() if name in settings}
    names = dict.fromkeys(arm for own in table.values() for arm in sorted(own, key=lambda arm: (arm != "lora", arm)))
    rows = [
        [arm, *(shown(100 * own[arm].average("accuracy"), 1) if arm in own else "–" for own in table.values())]
        for arm in names
        if arms is None or arm in arms
    ]
    return ["arm", *table], rows


def cost(sources: Sources, studies: Sequence[str]) -> Found:
    """Cells of each study and their processor time, cells of several studies counted once, with the first."""
    counted: set[str] = set()
    rows = []
    for name in studies:
        new = {
            result["run_info"]["experiment_name"]: result["train_info"]["metrics"][-1]
            for result in sources.results(name, seeds=True)
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
    "mechanism": mechanism,
    "equal_forgetting": equal_forgetting,
    "layers": layers,
    "correlations": correlations,
    "exact": exact,
    "cost": cost,
}
