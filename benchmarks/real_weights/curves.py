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
_NAMED = ("na_lora", "plain_reading", "random_mask", "short_step", "dora", "lora_plus")


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
    """Draws ``NAME_untuned.svg`` and ``NAME_forgetting.svg``."""
    plt = pyplot()
    files = [folder / f"{export.name}_{kind}.svg" for kind in ("untuned", "forgetting")]
    save(plt, _untuned(plt, export), files[0])
    save(plt, _forgetting(plt, export), files[1])
    return files


def _untuned(plt: object, export: Export) -> object:
    """The difference to the first arm at each common rate, and at the right at tuned ones with its interval."""
    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")  # type: ignore[attr-defined]
    places = [*range(len(export.common)), len(export.common) + 0.5]
    for arm in export.arms[1:]:
        rows = [next((row for row in table.rows if row.arm == arm), None) for table in (*export.common, export.tuned)]
        values = [math.nan if row is None else row.estimate.mean for row in rows]
        is_named = arm in _NAMED
        look = {"color": f"C{_NAMED.index(arm)}", "label": arm} if is_named else {"color": "0.8", "linewidth": 0.8}
        axes.plot(places[:-1], values[:-1], marker="o", markersize=3, **look)
        if is_named and (row := rows[-1]) is not None and not math.isnan(row.estimate.low):
            place = places[-1] + 0.08 * _NAMED.index(arm)
            ends = [[values[-1] - row.estimate.low], [row.estimate.high - values[-1]]]
            axes.errorbar(place, values[-1], yerr=ends, fmt="o", markersize=4, color=look["color"])
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set_xticks(places, [*(f"all at {table.rate:g}" for table in export.common), "each at its best"])
    axes.set_ylabel(f"test loss against {export.plan.baseline}, %")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    return figure


def _forgetting(plt: object, export: Export) -> object:
    """KL to the base model over test loss: the first arm's line over its rates, and the others at their best rates."""
    tasks = list(export.plan.tasks)
    figure, panels = plt.subplots(  # type: ignore[attr-defined]
        1, max(1, len(tasks)), figsize=(3.2 * max(1, len(tasks)), 3.2), layout="constrained", squeeze=False
    )
    chosen = tuned_rates(export.cells, export.plan)
    for axes, task in zip(panels[0], tasks, strict=False):
        for arm in export.arms:
            points = means(export, task, arm)
            if arm == export.plan.baseline:
                axes.plot([loss for _, loss, _ in points], [kl for *_, kl in points], "k.-", label=arm)
                continue
            look = {"color": f"C{_NAMED.index(arm)}", "label": arm} if arm in _NAMED else {"color": "0.8"}
            best = [(loss, kl) for rate, loss, kl in points if rate == chosen.get((task, arm))]
            for loss, kl in best:
                axes.plot(loss, kl, "o", markersize=4, **look)
        axes.set_title(task)
        axes.set_xlabel("test loss")
    panels[0][0].set_ylabel("KL to the base model")
    if panels[0][0].get_legend_handles_labels()[0]:
        panels[0][0].legend(fontsize="x-small")
    return figure
