"""Pictures of a page, as SVG that takes the colour of its text from the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from na_lora_lightning.curves import Curve
from na_lora_lightning.pictures import as_svg, heat_map, value_limits
from na_lora_lightning.report.facts import in_order
from na_lora_lightning.report.runs import Array, Run

# Told apart on light and dark ground, and by people who see few colours.
_COLOURS = (
    "#4477aa",
    "#ee6677",
    "#228833",
    "#ccbb44",
    "#66ccee",
    "#aa3377",
    "#999999",
    "#cc6600",
    "#7755cc",
    "#55aa88",
)
_MOST_POINTS = 400


def heat_maps(runs: Sequence[Run], curve: Curve) -> list[Markup]:
    """A map for each run, all with the same colours for the same values."""
    found = [run.gates(curve.group) for run in runs]
    values = [array for _, array in found if array.size and np.isfinite(array).any()]
    if not values or all(not np.nan_to_num(array).any() for array in values):
        return []
    limits = value_limits(np.concatenate([array.ravel() for array in values]))
    return [
        _map(run.name if len(runs) > 1 else curve.title, run.labels, steps, array, curve.colours or "", limits)
        for run, (steps, array) in zip(runs, found, strict=True)
        if steps
    ]


def difference(first: Run, second: Run, group: str) -> Markup | None:
    """Second minus first, where both have the same gates, at steps of which both have measurements near."""
    (steps, a), (other_steps, b) = first.gates(group), second.gates(group)
    if first.labels != second.labels or not steps or not other_steps:
        return None
    last = min(steps[-1], other_steps[-1])
    common = [step for step in steps if step <= last]
    if not common:
        return None
    nearest = [int(np.abs(np.asarray(other_steps) - step).argmin()) for step in common]
    values = b[:, nearest] - a[:, : len(common)]
    if not np.isfinite(values).any():
        return None
    most = float(np.nanmax(np.abs(values))) or 1.0
    return _map(f"{second.name} minus {first.name}", first.labels, common, values, "RdBu_r", (-most, most))


def losses(runs: Sequence[Run]) -> Markup | None:
    """Losses of training and validation over steps."""
    lines = []
    for index, run in enumerate(runs):
        for kind, style in (("steps", "-"), ("validations", "o--")):
            names = [name for name in in_order(dict.fromkeys(run.metric_names(kind))) if "loss" in name]
            for name in names[:1]:
                label = name if len(runs) == 1 else f"{run.name}: {name}" if len(runs) < 4 else run.name
                colour = index if len(runs) > 1 else int(kind == "validations")
                lines.append(
                    (*run.series(name, kind), style, colour, label if kind == "steps" or len(runs) < 4 else None)
                )
    return _lines(lines, "optimizer step", "loss")


def by_layer(runs: Sequence[Run], group: str, title: str) -> Markup | None:
    """The last values of each layer."""
    lines = []
    for index, run in enumerate(runs):
        last = run.last(group)
        if np.isfinite(last).any():
            lines.append((list(range(len(last))), last.tolist(), "o-", index, run.name if len(runs) > 1 else None))
    return _lines(lines, "gate, in the order of the forward pass", title, most=max(_MOST_POINTS, 1000))


def over_steps(runs: Sequence[Run], group: str, title: str) -> Markup | None:
    """The median layer over steps."""
    lines = []
    for index, run in enumerate(runs):
        steps, values = run.gates(group)
        known = [column for column in range(len(steps)) if np.isfinite(values[:, column]).any()]
        if known:
            medians = np.nanmedian(values[:, known], axis=0).tolist()
            lines.append(([steps[column] for column in known], medians, "-", index, run.name))
    return _lines(lines, "optimizer step", title)


def _lines(
    lines: Sequence[tuple[list[int], list[float], str, int, str | None]],
    across: str,
    up: str,
    most: int = _MOST_POINTS,
) -> Markup | None:
    lines = [line for line in lines if line[0]]
    if max((len(line[0]) for line in lines), default=0) < 2:
        return None
    with _plain_text():
        # With as much room to the left as its numbers need.
        figure = Figure(figsize=(6.4, 3.0), layout="constrained")
        axis = figure.add_subplot()
        for steps, values, style, colour, label in lines:
            at, means = _thinned(np.asarray(steps, dtype=float), np.asarray(values, dtype=float), most)
            axis.plot(
                at, means, style, markersize=4, linewidth=1.4, color=_COLOURS[colour % len(_COLOURS)], label=label
            )
        axis.set_xlabel(across, fontsize=9)
        axis.set_ylabel(up, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3, linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
        if any(label for *_, label in lines):
            axis.legend(fontsize=8, frameon=False)
        return _svg(figure)


def _thinned(at: Array, values: Array, most: int) -> tuple[Array, Array]:
    """Means over stretches of steps, where there are more points than can be seen."""
    if len(at) <= most:
        return at, values
    parts = np.array_split(np.arange(len(at)), most)
    return np.array([at[part].mean() for part in parts]), np.array([values[part].mean() for part in parts])


def _map(
    title: str, labels: Sequence[str], steps: Sequence[int], values: Array, colours: str, limits: tuple[float, float]
) -> Markup:
    with _plain_text():
        return _svg(heat_map(title, labels, steps, values, colours, limits))


def _svg(figure: Figure) -> Markup:
    with _plain_text():
        text = as_svg(figure)
    # Of the page, which may be dark.
    return Markup(text.replace("#000000", "currentColor"))


@contextmanager
def _plain_text() -> Iterator[None]:
    """Names of runs and layers are no formulas."""
    with matplotlib.rc_context({"text.parse_math": False}):
        yield
