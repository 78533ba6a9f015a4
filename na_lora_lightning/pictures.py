"""Heat maps of layers over steps, drawn by matplotlib without its global state, so that no window is opened."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

# More columns than a picture has pixels say nothing.
_MOST_COLUMNS = 400
_MOST_NAMES = 10
_DPI = 110


def heat_map(
    title: str,
    labels: Sequence[str],
    steps: Sequence[int],
    values: NDArray[np.floating[Any]],
    colours: str = "viridis",
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Layers from the lowest up, and optimizer steps from left to right.

    Args:
        title: Above the picture.
        labels: Of the sites.
        steps: Optimizer steps, ascending.
        values: ``[sites, steps]``; NaN is left blank.
        colours: Name of a colour map.
        limits: Values of the first and of the last colour; by default the least and the greatest.
    """
    from matplotlib.figure import Figure

    height = min(9.0, 1.3 + 0.085 * max(len(labels), 10))
    figure = Figure(figsize=(6.4, height))
    low, names = 0.55, max((len(name) for name in _names(labels)), default=1)
    left = min(2.4, 0.5 + 0.085 * names)
    axis = figure.add_axes((left / 6.4, low / height, (5.45 - left) / 6.4, (height - low - 0.4) / height))
    at, columns = _evenly(steps, values)
    half = (at[1] - at[0]) / 2 if len(at) > 1 else 0.5
    low_value, high_value = limits or value_limits(values)
    image = axis.imshow(
        np.ma.masked_invalid(columns),
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap=colours,
        vmin=low_value,
        vmax=high_value,
        extent=(at[0] - half, at[-1] + half, -0.5, len(labels) - 0.5),
    )
    axis.set_facecolor("0.85")
    every = max(1, -(-len(labels) // _MOST_NAMES))
    axis.set_yticks(range(0, len(labels), every), _names(labels)[::every], fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_xlabel("optimizer step", fontsize=9)
    axis.set_title(title, fontsize=10, loc="left")
    bar = figure.colorbar(
        image, cax=figure.add_axes((5.6 / 6.4, low / height, 0.16 / 6.4, (height - low - 0.4) / height))
    )
    bar.ax.tick_params(labelsize=8)
    bar.formatter.set_powerlimits((-3, 4))  # type: ignore[attr-defined]
    return figure


def as_png(figure: Figure) -> bytes:
    """The file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DPI)
    return content.getvalue()


def as_pixels(png: bytes) -> NDArray[np.uint8]:
    """``[height, width, 3]``."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))


def as_svg(figure: Figure) -> str:
    """The element, to be put into a page; equal for equal figures."""
    import matplotlib

    content = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "na-lora", "svg.fonttype": "none"}):
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = content.getvalue()
    return text[text.index("<svg") :]


def _names(labels: Sequence[str]) -> list[str]:
    """Short names: what all have in common is left out."""
    if all(label.startswith("layer_") for label in labels):
        return [label.removeprefix("layer_").lstrip("0") or "0" for label in labels]
    return [label if len(label) <= 24 else f"…{label[-23:]}" for label in labels]


def value_limits(values: NDArray[np.floating[Any]]) -> tuple[float, float]:
    """The least and the greatest value that is finite; a little apart where they are one."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    return (low, high) if high > low else (low, low + (abs(low) or 1.0))


def _evenly(
    steps: Sequence[int], values: NDArray[np.floating[Any]]
) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]:
    """Columns at even distances: of each the nearest step."""
    known = np.asarray(steps, dtype=float)
    if len(known) == 1:
        return known, values
    distance = np.diff(known).min()
    count = int(min(_MOST_COLUMNS, round((known[-1] - known[0]) / distance) + 1))
    at = np.linspace(known[0], known[-1], count)
    after = np.clip(np.searchsorted(known, at), 1, len(known) - 1)
    nearest = np.where(at - known[after - 1] <= known[after] - at, after - 1, after)
    return at, values[:, nearest]
