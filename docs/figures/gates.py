"""Draws the README's picture of gates from the event file of a run; needs matplotlib.

Usage: python docs/figures/gates.py runs/quickstart/version_0 docs/figures/gates.png
"""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PANELS = (
    ("gate_responsiveness", "Gate responsiveness\nmean |φ'| over channels and tokens", "viridis"),
    ("selection_misalignment", "Selection misalignment\nmean |ρ(g+δ) − ρ(g)|", "magma"),
)


def draw(run: str, target: str) -> None:
    """Draws layers × optimizer steps, a panel for each curve."""
    events = EventAccumulator(run)
    events.Reload()
    figure, axes = plt.subplots(1, len(PANELS), figsize=(9, 3.6), layout="constrained", sharey=True)
    for axis, (curve, title, colours) in zip(axes, PANELS, strict=True):
        tags = sorted(tag for tag in events.Tags()["scalars"] if tag.startswith(f"{curve}/layer_"))
        values = np.array([[point.value for point in events.Scalars(tag)] for tag in tags])
        # TensorBoard counts from 0.
        steps = np.array([point.step + 1 for point in events.Scalars(tags[0])])
        mesh = axis.pcolormesh(steps, np.arange(len(tags)), values, cmap=colours, shading="nearest")
        figure.colorbar(mesh, ax=axis)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("optimizer step")
        axis.set_xticks(steps[1::2])
    axes[0].set_ylabel("layer")
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    draw(*sys.argv[1:])
