"""Figures of a study, and those of docs/evidence.md; they need matplotlib."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.study import StudyError
from benchmarks.study.report.comparison import Table, When, bootstrap_interval, score_of, verdicts
from benchmarks.study.report.evidence_tables import Sources
from benchmarks.study.report.mechanism import mechanisms

_CURVES = 6


def pyplot() -> Any:
    """Pyplot of matplotlib, set up to write the same SVG each time.

    Raises:
        StudyError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise StudyError("figures need matplotlib; install it, or go without them.") from error
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "study"
    import matplotlib.pyplot as plt

    return plt


def save(plt: Any, figure: Any, file: Path) -> None:
    """Writes a figure without its date, and closes it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def draw(results: Sequence[Mapping[str, Any]], table: Table, baseline: str, when: When, output: Path) -> None:
    """Draws ``differences.svg``, ``rates.svg`` and ``walk.svg`` into a folder.

    Raises:
        StudyError: matplotlib is not installed.
    """
    plt = pyplot()
    best = list(verdicts(table, baseline))[: _CURVES - 1]
    for name, figure in (
        ("differences", _differences(plt, table, baseline)),
        ("rates", _rates(plt, results, table, [baseline, *best], when)),
        ("walk", _walk(plt, results, table, [baseline, *best])),
    ):
        save(plt, figure, output / f"{name}.svg")


def _differences(plt: Any, table: Table, baseline: str) -> Any:
    found = {arm: one for arm, one in verdicts(table, baseline).items() if abs(one.relative) < 50}
    figure, axes = plt.subplots(figsize=(7, 1 + 0.25 * len(found)), layout="constrained")
    for row, one in enumerate(found.values()):
        axes.plot(one.interval, [row, row], color="tab:blue")
        axes.plot(one.relative, row, "o", color="tab:blue")
    axes.axvline(0.0, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlabel(f"test loss minus {baseline}, % (negative is better)")
    return figure


def _panels(plt: Any, table: Table) -> tuple[Any, list[Any]]:
    figure, grid = plt.subplots(1, len(table), figsize=(4.5 * len(table), 3.5), layout="constrained", squeeze=False)
    return figure, list(grid[0])


def _rates(plt: Any, results: Sequence[Mapping[str, Any]], table: Table, arms: Sequence[str], when: When) -> Any:
    curves: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        config = result["run_info"]["train_config"]
        curves[config["setting"], config["arm_name"]][config["rate"]].append(score_of(result, when).valid)
    figure, panels = _panels(plt, table)
    for axes, setting in zip(panels, table, strict=True):
        for arm in arms:
            by_rate = sorted((rate, mean(values)) for rate, values in curves[setting, arm].items())
            axes.plot(*zip(*by_rate, strict=True), marker="o", label=arm) if by_rate else None
        axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss", title=setting)
    panels[0].legend(fontsize=7)
    return figure


def _walk(plt: Any, results: Sequence[Mapping[str, Any]], table: Table, arms: Sequence[str]) -> Any:
    """How far rows of B are from zero at the end, by decile of their channels' |φ'|."""
    norms: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    for result in results:
        config = result["run_info"]["train_config"]
        found = table.get(config["setting"], {}).get(config["arm_name"])
        last = result["study_info"]["probes"][-1]
        if found is not None and config["rate"] == found.rate and "row_norm" in last:
            norms[config["setting"], config["arm_name"]].append(last["row_norm"]["output"])
    figure, panels = _panels(plt, table)
    for axes, setting in zip(panels, table, strict=True):
        for arm in arms:
            rows = norms[setting, arm]
            if rows:
                axes.plot(range(1, len(rows[0]) + 1), [mean(column) for column in zip(*rows, strict=True)], label=arm)
        axes.set(xlabel="decile of |φ'|", ylabel="norm of a row of B", title=setting)
    panels[0].legend(fontsize=7)
    return figure


SCREENING, CONFIRMATION = "second_round", "confirmation"
_WALKERS = ("lora", "mask", "mask_tail", "random")
# One of each kind, as far as their names do not lie on each other.
_MOVERS = ("dora", "gates_slow_a", "mask", "mask_keep_75", "others_slow_a", "rslora", "scale", "tail_channel")


def draw_all(sources: Sources, folder: Path) -> None:
    """Draws ``walk.svg``, ``misalignment.svg`` and ``confirmation.svg``.

    Raises:
        StudyError: matplotlib is not installed.
    """
    plt = pyplot()
    save(plt, walk(plt, sources), folder / "walk.svg")
    save(plt, misalignment(plt, sources), folder / "misalignment.svg")
    save(plt, confirmation(plt, sources), folder / "confirmation.svg")


def walk(plt: Any, sources: Sources) -> Any:
    """Norm of rows of B at the end over their mean, by decile of |φ'| of their channels; one panel a setting."""
    norms: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for result in sources.results(SCREENING):
        config, last = result["run_info"]["train_config"], result["study_info"]["probes"][-1]
        if config["arm_name"] in _WALKERS and result["train_info"]["status"] == "success":
            rows = last["row_norm"]["output"]
            norms[config["setting"]][config["arm_name"]].append([row / mean(rows) for row in rows])
    figure, grid = plt.subplots(
        1, max(1, len(norms)), figsize=(3.6 * max(1, len(norms)), 3), layout="constrained", squeeze=False, sharey=True
    )
    for axes, (setting, by_arm) in zip(grid[0], sorted(norms.items()), strict=False):
        for arm in _WALKERS:
            if by_arm[arm]:
                axes.plot(range(1, 11), [mean(column) for column in zip(*by_arm[arm], strict=True)], label=arm)
        axes.set(xlabel="decile of |φ'|, least to most responsive", title=setting)
    grid[0][0].set_ylabel("norm of a row of B ÷ mean")
    grid[0][0].legend(fontsize=7)
    return figure


def misalignment(plt: Any, sources: Sources) -> Any:
    """Left: plain LoRA's cells. Right: arms at LoRA's learning rates, forgetting against how far selection moved."""
    results = sources.results(SCREENING)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    plain: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for result in results:
        config = result["run_info"]["train_config"]
        if config["arm_name"] == "lora" and result["train_info"]["status"] == "success":
            score = score_of(result, "last")
            if score.misalignment:
                plain[config["setting"]].append((score.misalignment, score.forgetting))
    for setting, points in sorted(plain.items()):
        left.plot(*zip(*points, strict=True), "o", markersize=4, label=setting)
    left.set(xscale="log", yscale="log", xlabel="mean |Δρ|", ylabel="forgetting, nats", title="plain LoRA, all rates")
    left.legend(fontsize=7)
    for arm, one in mechanisms(results, "lora").items():
        if arm in _MOVERS:
            right.plot(one.misalignment, one.forgetting, "o", color="tab:blue", markersize=4)
            right.annotate(
                arm, (one.misalignment, one.forgetting), fontsize=6, xytext=(3, 2), textcoords="offset points"
            )
    right.margins(x=0.12)
    right.axhline(0.0, color="gray", linewidth=0.8)
    right.axvline(1.0, color="gray", linewidth=0.8)
    right.set(
        xlabel="|Δρ| ÷ that of LoRA", ylabel="forgetting minus that of LoRA, nats", title="at equal learning rates"
    )
    return figure


def confirmation(plt: Any, sources: Sources) -> Any:
    """Difference of the test loss from plain LoRA's, with interval, by setting and pooled."""
    table = sources.table(CONFIRMATION)
    found = verdicts(table, "lora")
    figure, grid = plt.subplots(
        1, 1 + len(table), figsize=(3 * (1 + len(table)), 1 + 0.28 * len(found)), layout="constrained", sharey=True
    )
    panels = [("all settings", {arm: (one.relative, one.interval) for arm, one in found.items()})]
    for setting, arms in table.items():
        own = {}
        for arm in found:
            if arm in arms and arms[arm].differences:
                level = mean(arms["lora"].scores[seed].test for seed in arms[arm].differences)
                values = [100 * value / level for value in arms[arm].differences.values()]
                own[arm] = (mean(values), bootstrap_interval([values]))
        panels.append((setting, own))
    for axes, (title, points) in zip(grid, panels, strict=True):
        for row, arm in enumerate(found):
            if arm in points and abs(points[arm][0]) < 50:
                value, interval = points[arm]
                axes.plot(interval, [row, row], color="tab:blue")
                axes.plot(value, row, "o", color="tab:blue", markersize=4)
        axes.axvline(0.0, color="gray", linewidth=0.8)
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("test loss − LoRA, %", fontsize=8)
    grid[0].set_yticks(range(len(found)), list(found))
    grid[0].invert_yaxis()
    return figure
