"""Figures of a study; they need matplotlib."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.study.errors import StudyError
from benchmarks.study.report.comparison import Table, When, score_of, verdicts

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
