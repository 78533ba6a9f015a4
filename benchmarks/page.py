"""Writes ``docs/benchmarks.md`` and its figure from what the benchmarks left in ``benchmarks/results``. ::

    python benchmarks/page.py

A part of the page whose results are not there says so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from framework_arms import ARMS, WORKLOADS
from lora_step import BOUNDS

matplotlib.use("svg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
AXES = {
    "layers": "layers",
    "width": "width (the feed-forward block is three times as wide)",
    "length": "tokens of a row, of four",
    "rank": "rank",
    "sites": "layers with LoRA, of eight",
    "experts": "experts of a Mixtral",
}
_OPTIMIZERS = {"fused": "operations a step, AdamW fused", "default": "torch's default AdamW"}
HEAD = """# Benchmarks

Time, memory and operations of this package beside what else trains LoRA. `make benchmark` measures all of it anew and
writes this page.

Arms take turns, a step or a few at a time, so that a machine whose speed drifts slows all alike. Figures are medians
over rounds, and ratios are those of medians; *minima* are ratios of the shortest rounds, which other programs
disturb least. Where no other arm is named, ratios are to PEFT's LoRA in a plain loop. NA-LoRA is both mechanisms from
the first step, without curves.
"""
ENDING = """
## What was not measured

Several GPUs, FSDP, flash-attention, quantised bases and models above a billion parameters; and how fast anything
learns: arms are compared by step.
"""


ON_A_GPU = """*GPU busy* is the figure to look at first. Where it is near 100 %, in the large model at 8 × 2048 tokens,
LoRA in one function takes 0.95 of PEFT's time and 0.64 of its memory, NA-LoRA on 128 tokens a site 0.96, and DoRA 1.19
where PEFT's takes 1.50; on all tokens the gates' statistics are passes over memory of their own and cost a third more.
Where the GPU is busy for a small part of the time, a step lasts as long as Python and torch take to launch its kernels:
LoRA in one function launches 11 to 12 % fewer and takes as long as PEFT's, and both mechanisms add 5 to 18 %.
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def on(found: dict[str, Any]) -> str:
    where = found["where"]
    threads = "one thread" if where["threads"] == 1 else f"{where['threads']} threads"
    # Results of before do not say it.
    busy = f", {where['cores']} cores with a load of {where['load']:.1f}" if "load" in where else ""
    return f"{where['device']}, {threads}, torch {where['torch']}{busy}"


def steps(found: dict[str, Any], rounds: bool = True) -> Iterator[str]:
    """Tables of ``lora_step.py``, one for each model, dtype and batch."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in found["rows"]:
        groups.setdefault((row["model"], row["dtype"], row["tokens"]), []).append(row)
    for (model, dtype, tokens), rows in groups.items():
        is_gpu = "kernels" in rows[0]
        head = ["arm", "ms a step", "ratio", "minima"] + (
            ["kernels", "GPU busy", "peak MiB"] if is_gpu else ["asked for"]
        )
        lines = []
        for row in rows:
            line = [row["arm"], f"{row['median_ms']:.1f}", f"{row['of_medians']:.3f}", f"{row['of_minima']:.3f}"]
            if is_gpu:
                line += [f"{row['kernels']:,}", f"{row['utilisation']:.0%}", f"{row['peak_mib']:,.0f}"]
            else:
                line += [f"{BOUNDS[row['arm']]:.2f}" if row["arm"] in BOUNDS else ""]
            lines.append(line)
        shape = tokens.replace("x", " × ")
        yield f"**{model} model, {dtype} base, {shape} tokens**, {rows[0]['rounds']} rounds:\n\n{table(head, lines)}"


def operations(found: dict[str, Any]) -> str:
    """Operations with each kind of optimizer that was counted, and memory."""
    optimizers = [each for each in _OPTIMIZERS if any(each in arm for arm in found["arms"].values())]
    rows = []
    for arm, each in found["arms"].items():
        counts = [each.get(name) for name in optimizers] or [each if "operations" in each else None]
        row = [arm]
        for count in counts:
            row += ["", ""] if count is None else [f"{count['operations']:,}", f"{count['of_operations']:.3f}"]
        row += [f"{each['peak_mib']:,.0f}", f"{each['of_peak']:.3f}"] if "peak_mib" in each else ["", ""]
        rows.append(row)
    heads = [_OPTIMIZERS[name] for name in optimizers] or ["operations a step"]
    return table(["arm", *(part for head in heads for part in (head, "ratio")), "peak MiB", "ratio"], rows)


def frameworks(found: dict[str, Any]) -> Iterator[str]:
    for workload in dict.fromkeys(row["workload"] for row in found["rows"]):
        lines = [
            [
                ARMS[row["arm"]],
                f"{row['step_seconds']:.2f}",
                f"{row['targets_per_second']:,.0f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['ratio']:.2f}",
                f"{row['peak_gib']:.2f}",
            ]
            for row in found["rows"]
            if row["workload"] == workload
        ]
        head = ["arm", "s a step", "targets/s", "real tokens/s", "× Trainer's", "peak GiB"]
        yield f"**{WORKLOADS[workload].capitalize()}**:\n\n{table(head, lines)}"
    if absent := [said for name, said in WORKLOADS.items() if all(row["workload"] != name for row in found["rows"])]:
        yield f"Not measured yet: {'; '.join(absent)}.\n"


def growth(found: dict[str, Any]) -> str:
    rows = [
        [AXES[row["axis"]], str(row["value"]), f"{row['reference_ms']:.0f}"]
        + [f"{ratio:.3f}" for name, ratio in row["of_medians"].items() if "PEFT" not in name]
        for row in found["rows"]
    ]
    head = ["what grows", "to", "PEFT LoRA, ms", "LoRA", "NA-LoRA, 128 tokens a site", "NA-LoRA, all tokens"]
    return table(head, rows)


def curves(found: dict[str, Any]) -> str:
    """What ``curves.py`` found."""
    blocks = "all blocks" if found["blocks"] is None else f"the last {found['blocks']} blocks"
    shape, steps = found["tokens"].replace("x", " × "), found["steps"]
    return (
        f"SmolLM2-135M, float32, LoRA on {blocks}, {shape} tokens (`benchmarks/curves.py`): the loss goes from "
        f"{found['first']:.2f} to {found['last']:.2f} in {steps} steps, and on layers of this package and of PEFT it "
        f"differs by {found['largest_difference']:.1e} at most. In double precision it differs by less than 2e-6, and "
        "adapters of each load in the other (`tests/models/test_fast_lora.py`).\n"
    )


def draw(results: dict[str, Any], path: Path) -> None:
    """Tokens a second of frameworks by workload, and how the ratios grow."""
    plt.rcParams["svg.hashsalt"] = "benchmarks"
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    rows = results.get("frameworks", {"rows": []})["rows"]
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    for place, workload in enumerate(workloads):
        of_arm = {row["arm"]: row["ratio"] for row in rows if row["workload"] == workload}
        height = 0.8 / len(workloads)
        places = [index + (place - (len(workloads) - 1) / 2) * height for index in range(len(arms))]
        left.barh(places, [of_arm.get(arm, 0) for arm in arms], height, label=WORKLOADS[workload])
    left.set_yticks(range(len(arms)), [ARMS[arm] for arm in arms], fontsize=8)
    left.invert_yaxis()
    left.axvline(1, color="grey", linewidth=0.8)
    left.set_xlabel("tokens a second, of Trainer and PEFT's")
    beside = {"fontsize": 7, "loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "ncol": 2}
    if workloads:
        left.legend(**beside)
    cells = results.get("growth", {"rows": []})["rows"]
    for axis in dict.fromkeys(row["axis"] for row in cells):
        of_axis = [row for row in cells if row["axis"] == axis]
        ratios = [row["of_medians"]["NA-LoRA, 128 tokens a site"] for row in of_axis]
        right.plot(
            range(len(ratios)), ratios, marker="o", label=f"{axis}: {', '.join(str(r['value']) for r in of_axis)}"
        )
    right.axhline(1, color="grey", linewidth=0.8)
    right.set_xticks([])
    right.set_xlabel("the model grows")
    right.set_ylabel("NA-LoRA's step, of PEFT LoRA's")
    if cells:
        right.legend(**beside)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def page(results: dict[str, Any]) -> str:
    """The page in Markdown."""
    missing = "Not measured yet.\n"
    parts = [HEAD, "![Tokens a second by framework; NA-LoRA's price as a model grows](figures/benchmarks.svg)\n"]
    parts += ["## Against other frameworks\n"]
    if "frameworks" in results:
        found = results["frameworks"]
        parts += [f"SmolLM2-135M, LoRA of rank 16 on all linear layers, batches of 8 records, float32. {on(found)}.\n"]
        parts += list(frameworks(found))
    else:
        parts += [missing]
    parts += [
        "## A step\n",
        "Small: 6 layers of 576 × 1536. Large: 16 of 2048 × 5632. LoRA of rank 16 on all linear layers.\n",
    ]
    parts += [f"{on(results['step'])}, processor time.\n", *steps(results["step"])] if "step" in results else [missing]
    parts += ["## Operations and memory\n"]
    if "operations" in results:
        parts += [
            "A Llama of 30 small layers, on a CPU; an operation on a list of tensors counts once. Modules of this "
            "package and transformers' Trainer make AdamW fused; torch's default steps parameter by parameter on a "
            "CPU, half of PEFT LoRA's count. Memory at 8 × 512 tokens with a bfloat16 base.\n"
        ]
        parts += [operations(results["operations"])]
    else:
        parts += [missing]
    parts += ["## How the price grows\n"]
    parts += (
        [f"{on(results['growth'])}, processor time.\n", growth(results["growth"])] if "growth" in results else [missing]
    )
    parts += ["## On a GPU\n"]
    if "gpu_step" in results:
        parts += [
            f"{on(results['gpu_step'])}; the time until the GPU is done, adapters in float32.\n",
            ON_A_GPU,
            *steps(results["gpu_step"]),
        ]
        if "gpu_operations" in results:
            parts += ["Kernels of a Llama of 30 small layers, and memory:\n", operations(results["gpu_operations"])]
    else:
        parts += ["There was no GPU to measure on.\n"]
    parts += ["## The same losses\n", curves(results["curves"]) if "curves" in results else missing]
    return "\n".join(parts) + ENDING


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    results = {path.stem: json.loads(path.read_text()) for path in sorted(options.results.glob("*.json"))}
    (options.docs / "figures").mkdir(parents=True, exist_ok=True)
    draw(results, options.docs / "figures" / "benchmarks.svg")
    (options.docs / "benchmarks.md").write_text(page(results), encoding="utf-8")
    print(f"{options.docs / 'benchmarks.md'} from {', '.join(results) or 'nothing'}")


if __name__ == "__main__":
    main()
