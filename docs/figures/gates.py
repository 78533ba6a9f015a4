"""Draws the README's picture of gates from the history of a run.

Usage: python docs/figures/gates.py runs/quickstart/version_0 docs/figures/gates.png
"""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import numpy as np

from na_lora_lightning.history import read_history

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


if __name__ == "__main__":
    draw(*sys.argv[1:])
