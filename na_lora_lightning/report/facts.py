"""What a run says in numbers: whether it learnt, what moved most, whether the method was in force."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from na_lora_lightning.report.runs import Run

_MOST_LAYERS = 6
# Times the median; below it no layer stands out.
_STANDS_OUT = 2.0
# The order of tables; what else was measured comes below.
_FIRST_METRICS = ("contains_match", "exact_match", "accuracy", "loss", "perplexity", "token_accuracy")

_LESS_IS_BETTER = ("loss", "perplexity")
_SETTINGS = (
    ("lora.r", "rank"),
    ("lora.lora_alpha", "alpha"),
    ("optimizer.class_path", "optimizer"),
    ("optimizer.init_args.lr", "learning rate"),
    ("schedule.name", "schedule"),
    ("data.batch_size", "batch size"),
    ("data.max_length", "tokens at most"),
    ("data.seed", "seed of the data"),
)


def number(value: Any, digits: int = 4) -> str:
    """A number as tables have it; empty for none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    if not np.isfinite(value):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"


def layer_name(label: str) -> str:
    """``layer 21`` of ``layer_21``, ``vision layer 3`` of ``vision_layer_03``."""
    words = label.split("_")
    return " ".join(str(int(word)) if word.isdigit() else word for word in words) if "layer" in words else label


def metric_rows(run: Run) -> list[dict[str, str]]:
    """Metrics of validation before and after, and their change."""
    first, last = ((entry or {}).get("metrics", {}) for entry in (run.before, run.after))
    return [
        {
            "name": name,
            "before": number(first.get(name)),
            "after": number(last.get(name)),
            "change": _difference(first.get(name), last.get(name)),
        }
        for name in in_order({**first, **last})
    ]


def in_order(names: Mapping[str, Any]) -> list[str]:
    """Names of metrics, the most telling first."""
    rank = {name: position for position, name in enumerate(_FIRST_METRICS)}
    return sorted(names, key=lambda name: (rank.get(name.rpartition("/")[2], len(rank)), name))


def _difference(first: Any, second: Any) -> str:
    is_both = all(isinstance(value, (int, float)) for value in (first, second))
    return f"{second - first:+.4g}" if is_both else ""


def headline(run: Run) -> str:
    """Whether the run learnt, in one sentence."""
    first, last = ((entry or {}).get("metrics", {}) for entry in (run.before, run.after))
    both = [name for name in in_order(last) if name in first]
    if both:
        name, step = both[0], run.after["step"] if run.after else 0
        said = f"{name} went from {number(first[name])} before training to {number(last[name])} at step {step:,}."
        return _verdict(name, first[name], last[name]) + said
    steps, losses = next(
        (known for name in run.metric_names() if name.endswith("loss") and len((known := run.series(name))[0]) > 1),
        ([], []),
    )
    if losses:
        return (
            f"The training loss went from {number(losses[0])} at step {steps[0]:,} to {number(losses[-1])} at step "
            f"{steps[-1]:,}; other data were not measured {'after' if run.after is None else 'before'} training."
        )
    if run.before is not None or run.after is not None:
        return f"Metrics were measured {'before' if run.after is None else 'after'} training alone."
    return "No metric was measured before and after training."


def _verdict(name: str, first: Any, last: Any) -> str:
    if not all(isinstance(value, (int, float)) and np.isfinite(value) for value in (first, last)):
        return ""
    gain = last - first if name.rpartition("/")[2] not in _LESS_IS_BETTER else first - last
    return "Yes: " if gain > 0 else "No: " if gain < 0 else "Not by this measure: "


def settings(run: Run) -> str:
    """The options that say most, in one line."""
    return ", ".join(f"{title} {number(run.options[name])}" for name, title in _SETTINGS if name in run.options)


def layer_rows(run: Run) -> list[dict[str, str]]:
    """The layers that moved their selection most."""
    moved = run.last("selection_misalignment")
    if not np.isfinite(moved).any():
        return []
    median = float(np.nanmedian(moved))
    others = {group: run.last(group) for group in ("selection_share", "gate_responsiveness")}
    order = [index for index in np.argsort(-np.nan_to_num(moved, nan=-1.0))[:_MOST_LAYERS] if np.isfinite(moved[index])]
    return [
        {
            "layer": layer_name(run.labels[index]),
            "moved": number(float(moved[index]), 3),
            "times": number(float(moved[index]) / median, 3) if median > 0 else "",
            "share": number(float(others["selection_share"][index]), 3),
            "responsiveness": number(float(others["gate_responsiveness"][index]), 3),
            "quiet": number(run.quiet.get(run.labels[index], 0)),
        }
        for index in order
    ]


def hints(run: Run) -> list[str]:
    """What stands out, as numbers."""
    found = []
    moved = run.last("selection_misalignment")
    median = float(np.nanmedian(moved)) if np.isfinite(moved).any() else 0.0
    if median > 0 and len(moved) > 2:
        top = int(np.nanargmax(moved))
        times, name = float(moved[top]) / median, layer_name(run.labels[top])
        name = name[:1].upper() + name[1:]
        if times >= _STANDS_OUT:
            found.append(
                f"{name} moves its selection {times:.1f} times as much as the median layer "
                f"({moved[top]:.3g} against {median:.3g})."
            )
        else:
            found.append(
                f"No layer stands out: {name} moves its selection most, {times:.1f} times as much as the median layer."
            )
    shares = run.last("selection_share")
    if np.isfinite(shares).any():
        top = int(np.nanargmax(shares))
        found.append(
            f"Selection is {100 * float(np.nanmedian(shares)):.3g} % of what the adapter changes in the median layer, "
            f"and {100 * float(shares[top]):.3g} % in {layer_name(run.labels[top])}, where it is most."
        )
    return found + _quiet(run)


def _quiet(run: Run) -> list[str]:
    channels = run.history.channels
    if not channels or "quiet" not in channels:
        return []
    below, since = number(channels.get("below")), number(channels.get("since", 0))
    quiet = run.quiet
    if not quiet:
        return [f"Every channel had a mean slope of at least {below} at some logged step after step {since}."]
    most = sorted(quiet, key=lambda label: -quiet[label])[:3]
    where = ", ".join(f"{quiet[label]:,} in {layer_name(label)}" for label in most)
    return [
        f"{sum(quiet.values()):,} of {run.channels:,} channels had a mean slope below {below} at every logged step "
        f"after step {since}, so their gates hardly respond: {where}{', ...' if len(quiet) > 3 else ''}."
    ]


def evidence(run: Run) -> str:
    """Whether the method acted, by what was measured and not by what was asked for."""
    said = []
    steps, density = run.gates("gate_mask_density")
    held = [step for step, column in zip(steps, density.T, strict=True) if np.nanmin(column) < 1.0]
    if held:
        part = 100 * (1.0 - float(np.nanmean(density[:, steps.index(held[-1])])))
        said.append(f"Rows were held from step {held[0]:,} on, as far as logged; {part:.3g} % of them at the last.")
    elif steps:
        said.append("No row was held at any logged step.")
    scaled, deviation = run.gates("gate_step_scale_deviation")
    if scaled and "step_scale" in run.history.start.get("mechanisms", {}):
        said.append(
            f"The step scale varied over channels by {float(np.nanmean(deviation[:, -1])):.3g} at the last step."
        )
    return " ".join(said) or "Nothing was measured of it."


def differing_options(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Options that are not the same in all runs."""
    names = list(dict.fromkeys(name for run in runs for name in run.options))
    rows = [(name, [number(run.options.get(name)) for run in runs]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def comparison(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """What runs came to, a row for each measure; with two runs the last value is their difference."""
    rows: list[tuple[str, list[Any]]] = []
    names = in_order({name: None for run in runs for name in (run.after or {}).get("metrics", {})})
    rows += [(name, [(run.after or {}).get("metrics", {}).get(name) for run in runs]) for name in names]
    for group, title in (
        ("selection_misalignment", "selection misalignment, median layer"),
        ("selection_share", "selection share, median layer"),
        ("gate_responsiveness", "responsiveness, median layer"),
    ):
        lasts = [run.last(group) for run in runs]
        rows.append((title, [float(np.nanmedian(last)) if np.isfinite(last).any() else None for last in lasts]))
    rows.append(("seconds per step", [run.seconds_per_step for run in runs]))
    shown = []
    for title, values in rows:
        if any(value is not None for value in values):
            extra = [_difference(values[0], values[1])] if len(runs) == 2 else []
            shown.append((title, [number(value) for value in values] + extra))
    return shown
