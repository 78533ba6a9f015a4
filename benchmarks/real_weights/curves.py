"""Curves over learning rates of the comparison on real weights: forgetting at equal loss, and the figures."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from na_lora_lightning.compare.results import tuned_rates

if TYPE_CHECKING:
    from benchmarks.real_weights.evidence import Export

# The others are gray.
_NAMED = ("na_lora", "plain_reading", "random_mask", "short_step", "dora", "lora_plus", "rslora")


def pyplot() -> Any:
    """Pyplot of matplotlib, set up to write the same SVG each time."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "study"
    import matplotlib.pyplot as plt

    return plt


def save(plt: Any, figure: Any, file: Path) -> None:
    """Writes a figure without its date, and closes it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def at_equal_loss(export: Export, arm: str) -> dict[str, float]:
    """KL to the base model over the baseline's at the same test loss, by task.

    The baseline's is on the line through its means at each rate up to its best one; tasks are left out on which the
    arm's loss is off that line.
    """
    chosen = tuned_rates(export.cells, export.plan)
    found = {}
    for task in export.plan.tasks:
        if (task, arm) not in chosen or (task, export.plan.baseline) not in chosen:
            continue
        line = [
            each
            for rate, *each in means(export, task, export.plan.baseline)
            if rate <= chosen[task, export.plan.baseline]
        ]
        own = next(each for rate, *each in means(export, task, arm) if rate == chosen[task, arm])
        for (loss, kl), (next_loss, next_kl) in pairwise(line):
            if min(loss, next_loss) <= own[0] <= max(loss, next_loss) and loss != next_loss and min(kl, next_kl) > 0:
                share = (own[0] - loss) / (next_loss - loss)
                found[task] = own[1] / math.exp((1 - share) * math.log(kl) + share * math.log(next_kl))
    return found


def means(export: Export, task: str, arm: str) -> list[tuple[float, float, float]]:
    """Rate, test loss and KL on other text, each rate's mean over seeds, of the rates that did not diverge."""
    own = [entry for entry in export.cells if (entry.cell.task, entry.cell.arm) == (task, arm)]
    found = []
    for rate in sorted({entry.cell.rate for entry in own}):
        at = [entry.result for entry in own if entry.cell.rate == rate and math.isfinite(entry.result["test"])]
        if at:
            found.append((rate, *(sum(each[name] for each in at) / len(at) for name in ("test", "other_kl"))))
    return found  # type: ignore[return-value]


def draw(export: Export, folder: Path) -> list[Path]:
    """Draws ``NAME_rates.svg`` and ``NAME_forgetting.svg``."""
    plt = pyplot()
    files = [folder / f"{export.name}_{kind}.svg" for kind in ("rates", "forgetting")]
    save(plt, _rates(plt, export), files[0])
    save(plt, _forgetting(plt, export), files[1])
    return files


def _rates(plt: Any, export: Export) -> Any:
    """Test loss of each arm over rates, paired by seed with the first arm's at its best rate.

    Arms that differ in nothing but their rates meet at their bottoms; gaps at one rate are what an untuned comparison
    reports.
    """
    tasks = list(export.plan.tasks)
    figure, panels = _panels(plt, tasks)
    chosen = tuned_rates(export.cells, export.plan)
    rates = sorted({entry.cell.rate for entry in export.cells})
    for axes, task in zip(panels, tasks, strict=False):
        own = [entry for entry in export.cells if entry.cell.task == task]
        best = chosen.get((task, export.plan.baseline))
        at_best = [entry for entry in own if (entry.cell.arm, entry.cell.rate) == (export.plan.baseline, best)]
        level = {entry.cell.seed: entry.result["test"] for entry in at_best}
        for arm in export.arms:
            points = []
            for rate in sorted({entry.cell.rate for entry in own if entry.cell.arm == arm}):
                at = [e for e in own if (e.cell.arm, e.cell.rate) == (arm, rate) and e.cell.seed in level]
                changes = [100 * (e.result["test"] / level[e.cell.seed] - 1) for e in at]
                if changes and all(map(math.isfinite, changes)):
                    points.append((rate, sum(changes) / len(changes)))
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, **_look(export, arm))
        axes.axhline(0.0, color="black", linewidth=0.6)
        axes.set(xscale="log", title=task, xlabel="learning rate")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        axes.set_ylim(-8, 16)
    return _finished(figure, panels, f"test loss against {export.plan.baseline}'s best, %")


def _look(export: Export, arm: str) -> dict[str, Any]:
    if arm == export.plan.baseline:
        return {"color": "black", "label": arm}
    return {"color": f"C{_NAMED.index(arm)}", "label": arm} if arm in _NAMED else {"color": "0.75", "linewidth": 0.8}


def _panels(plt: Any, tasks: list[str]) -> tuple[Any, Any]:
    count = max(1, len(tasks))
    # Two in a row, as wide as a page's text.
    rows = (count + 1) // 2
    figure, panels = plt.subplots(
        rows, min(2, count), figsize=(4 * min(2, count), 2.8 * rows), layout="constrained", squeeze=False
    )
    return figure, panels.flatten()


def _finished(figure: Any, panels: Any, label: str) -> Any:
    figure.supylabel(label, fontsize="medium")
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(fontsize="x-small")
    return figure


def _forgetting(plt: Any, export: Export) -> Any:
    """KL to the base model over test loss: the first arm's line over its rates, and the others at their best rates."""
    tasks = list(export.plan.tasks)
    figure, panels = _panels(plt, tasks)
    chosen = tuned_rates(export.cells, export.plan)
    for axes, task in zip(panels, tasks, strict=False):
        for arm in export.arms:
            points = means(export, task, arm)
            look = _look(export, arm)
            if arm == export.plan.baseline:
                axes.plot([loss for _, loss, _ in points], [kl for *_, kl in points], ".-", **look)
                continue
            for loss, kl in [(loss, kl) for rate, loss, kl in points if rate == chosen.get((task, arm))]:
                axes.plot(loss, kl, "o", markersize=4, **look)
        axes.set(title=task, xlabel="test loss")
    return _finished(figure, panels, "KL to the base model, nats")
