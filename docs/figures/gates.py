"""Draws the README's picture of gates from the history of a run, and the gallery's of the layers of several.

Usage: python docs/figures/gates.py runs/quickstart/version_0 docs/figures/gates.png
       python docs/figures/gates.py runs/spell-*/version_0 runs/riddles-*/version_0 docs/figures/layers.png
"""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import numpy as np

from na_lora_lightning.history import read_history
from na_lora_lightning.report.runs import read_runs

PANELS = (
    ("gate_responsiveness", "Gate responsiveness\nmean |φ'| over channels and tokens", "viridis"),
    ("selection_misalignment", "Selection misalignment\nmean |ρ(g+δ) − ρ(g)|", "magma"),
)


def draw(run: str, target: str) -> None:
    """Draws layers × optimizer steps, a panel for each curve."""
    history = read_history(run)
    assert history is not None, f"{run} has no history.jsonl"
    steps = np.array([entry["step"] for entry in history.steps])
    figure, axes = plt.subplots(1, len(PANELS), figsize=(9, 3.6), layout="constrained", sharey=True)
    for axis, (curve, title, colours) in zip(axes, PANELS, strict=True):
        values = np.array([entry["gates"][curve] for entry in history.steps]).T
        mesh = axis.pcolormesh(steps, np.arange(len(values)), values, cmap=colours, shading="nearest")
        figure.colorbar(mesh, ax=axis)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step")
        axis.set_xticks(steps[1::2])
    axes[0].set_ylabel("layer")
    figure.savefig(target, dpi=110)


def draw_layers(folders: list[str], target: str) -> None:
    """Draws how far each layer of several runs has moved its selection at the end."""
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for run in read_runs(folders):
        axis.semilogy(run.last("selection_misalignment"), marker=".", label=run.folder.parent.name)
    axis.set_xlabel("layer")
    axis.set_ylabel("selection misalignment")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    *runs, where = sys.argv[1:]
    if len(runs) == 1:
        draw(runs[0], where)
    else:
        draw_layers(runs, where)
