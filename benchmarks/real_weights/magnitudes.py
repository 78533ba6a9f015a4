"""DoRA's gain over how far magnitudes can move: ``python -m benchmarks.real_weights.magnitudes MODEL ...`` measures.

A step of Adam moves a magnitude by about the rate η, whatever its size, which is at first the norm ‖w‖ of a row of the
frozen weight. So magnitudes can move by η·T/‖w‖ of themselves in T steps, half of it under a cosine. Where that is
small, DoRA is LoRA.
"""

from __future__ import annotations

import json
import math
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.real_weights.curves import pyplot, save

if TYPE_CHECKING:
    from benchmarks.real_weights.evidence import Export

NORMS = Path(__file__).with_name("row_norms.json")
STUDY_MODELS = Path(__file__).parents[1] / "study" / "models"
# Real models, by the folders that they are prepared in; comparisons but those named here are of the first.
REAL = {"SmolLM2-135M-Instruct": "SmolLM2-135M", "gemma-3-270m": "Gemma 3 270M"}
_OF_COMPARISON = {"gemma": REAL["gemma-3-270m"]}
# Embeddings and heads have no LoRA.
_NOT_LORA = ("embed", "wte", "wpe", "lm_head", "vision", "norm")


class Point(NamedTuple):
    """DoRA against LoRA at one rate on one task.

    Attributes:
        model: Of which.
        move: η·T / (2‖w‖), the share of itself that a magnitude can move by.
        gain: Change of test loss, %.
        is_usual: Whether the rate is not above LoRA's best.
    """

    model: str
    move: float
    gain: float
    is_usual: bool


def row_norm(tensors: Mapping[str, Any], is_transposed: bool) -> float:
    """The median norm of the rows of linear layers; Conv1D of GPT-2 has them as columns."""
    norms: list[float] = []
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and not any(part in name for part in _NOT_LORA):
            norms += tensor.float().norm(dim=0 if is_transposed else 1).tolist()
    return median(norms)


def measured(folders: Iterable[Path]) -> dict[str, float]:
    """Row norms of the study's models and of real ones."""
    from safetensors.torch import load, load_file

    found = {}
    for file in sorted(STUDY_MODELS.glob("*.zip")):
        with zipfile.ZipFile(file) as archive:
            weights = load(archive.read("model.safetensors"))
        found[file.stem] = row_norm(weights, file.stem.startswith("gpt2"))
    real = {REAL[folder.name]: row_norm(load_file(folder / "model.safetensors"), False) for folder in folders}
    return {**found, **real}


def of_study(results: Iterable[Mapping[str, Any]], norms: Mapping[str, float]) -> list[Point]:
    """Points of the study, each a setting and a rate, over the seeds that both arms have."""
    found: dict[str, dict[float, dict[str, dict[int, float]]]] = defaultdict(lambda: defaultdict(dict))
    steps = {}
    for result in results:
        config = result["run_info"]["train_config"]
        if config["arm_name"] in ("lora", "dora") and result["train_info"]["status"] == "success":
            at = found[config["setting"]][config["rate"]].setdefault(config["arm_name"], {})
            at[config["seed"]] = result["train_info"]["metrics"][-1]["test loss"]
            steps[config["setting"]] = config["training"]["steps"]
    points = []
    for setting, rates in sorted(found.items()):
        model = setting.partition(".")[0]
        points += _points(model, rates, steps[setting] / (2 * norms[model]))
    return points


def of_export(export: Export, norms: Mapping[str, float]) -> list[Point]:
    """Points of a comparison on a real model, each a task and a rate."""
    points = []
    model = _OF_COMPARISON.get(export.name, next(iter(REAL.values())))
    for task in export.plan.tasks:
        rates: dict[float, dict[str, dict[int, float]]] = defaultdict(dict)
        steps = 0.0
        for entry in export.cells:
            if entry.cell.task == task and math.isfinite(entry.result["test"]):
                rates[entry.cell.rate].setdefault(entry.cell.arm, {})[entry.cell.seed] = entry.result["test"]
                steps = max(steps, entry.result["steps"])
        points += _points(model, rates, steps / (2 * norms[model]))
    return points


def _points(model: str, rates: Mapping[float, Mapping[str, Mapping[int, float]]], per_rate: float) -> list[Point]:
    plain = {rate: mean(arms["lora"].values()) for rate, arms in rates.items() if arms.get("lora")}
    found = []
    for rate, arms in sorted(rates.items()):
        lora, dora = arms.get("lora", {}), arms.get("dora", {})
        seeds = lora.keys() & dora.keys()
        if seeds:
            gain = mean(100 * (dora[seed] / lora[seed] - 1) for seed in seeds)
            found.append(Point(model, rate * per_rate, gain, rate <= min(plain, key=lambda each: plain[each])))
    return found


def rank_correlation(points: Iterable[Point]) -> float:
    """Spearman's, of how far magnitudes can move and the gain, at rates that are not above LoRA's best."""
    from scipy.stats import spearmanr

    usual = [point for point in points if point.is_usual]
    return float(spearmanr([point.move for point in usual], [point.gain for point in usual])[0])


def page_part(points: Sequence[Point]) -> dict[str, str]:
    """What the page says: the correlation, and how far magnitudes can move, in %, in the study and here."""
    moves: dict[bool, list[float]] = {True: [], False: []}
    for point in points:
        if point.is_usual:
            moves[point.model in REAL.values()].append(100 * point.move)
    here, study = (f"{min(own):.1f} to {max(own):.1f}" if own else "none" for own in (moves[True], moves[False]))
    return {"correlation": f"{rank_correlation(points):.2f}", "here": here, "study": study}


def all_points(results: Iterable[Mapping[str, Any]], exports: Iterable[Export]) -> list[Point]:
    """Points of the study and of comparisons on real models."""
    norms: dict[str, float] = json.loads(NORMS.read_text())
    return of_study(results, norms) + [point for export in exports for point in of_export(export, norms)]


def draw(points: Iterable[Point], file: Path) -> None:
    """Draws the gain over how far magnitudes can move; rates above LoRA's best are hollow."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    by_model: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        by_model[point.model].append(point)
    for number, (model, own) in enumerate(sorted(by_model.items())):
        for usual in (True, False):
            chosen = [point for point in own if point.is_usual == usual]
            axes.plot(
                [point.move for point in chosen],
                [point.gain for point in chosen],
                "o",
                color=f"C{number}",
                markersize=4,
                fillstyle="full" if usual else "none",
                label=model if usual else None,
            )
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="η·T / 2‖w‖: share of itself that a magnitude can move by", ylabel="DoRA − LoRA, %")
    axes.set_ylim(-10, 4)
    axes.legend(fontsize="small")
    save(plt, figure, file)


def main(folders: list[str]) -> None:
    """Measures the row norms."""
    found = [Path(folder) for folder in folders]
    if {folder.name for folder in found if folder.is_dir()} != REAL.keys():
        sys.exit(f"error: name the folders {' and '.join(REAL)}, which quick starts leave in .cache/quickstart.")
    NORMS.write_text(json.dumps(measured(found), indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
