"""How the price of NA-LoRA grows with a model, as ratios to PEFT's LoRA of the same model; one thread, minutes. ::

    OMP_NUM_THREADS=1 python benchmarks/growth.py [--rounds 8]

One thing is changed at a time in a Llama of 8 layers of 128 × 384 with LoRA of rank 8 on all linear layers, at 4 × 64
tokens; experts are those of a Mixtral, two for each token, with LoRA on their stacked parameters. It writes
``benchmarks/results/growth.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lora_arms import REFERENCE, VOCABULARY, base_model, make_arm, random_tokens, where
from lora_step import in_turn
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

RESULTS = Path(__file__).parent / "results" / "growth.json"
ARMS = (REFERENCE, "LoRA", "NA-LoRA, 128 tokens a site", "NA-LoRA, all tokens")
LLAMA = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8, "num_attention_heads": 4}
GROWTH: dict[str, list[int]] = {
    "layers": [2, 8, 32],
    "width": [64, 128, 256, 512],
    "length": [16, 64, 256, 1024],
    "rank": [2, 8, 32, 128],
    "sites": [1, 2, 4, 8],
    "experts": [2, 4, 8, 16],
}


def base_of(axis: str, value: int) -> nn.Module:
    """The model of a cell, frozen."""
    if axis == "experts":
        torch.manual_seed(0)
        sizes = {**LLAMA, "num_hidden_layers": 4, "num_key_value_heads": 4, "vocab_size": VOCABULARY}
        return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=value, num_experts_per_tok=2))  # type: ignore[arg-type]
    if axis == "layers":
        return base_model({**LLAMA, "num_hidden_layers": value})
    if axis == "width":
        return base_model({**LLAMA, "hidden_size": value, "intermediate_size": 3 * value})
    return base_model(LLAMA)


def measure(axis: str, value: int, rounds: int, steps: int) -> dict[str, Any]:
    """The ratios of a cell."""
    lora: dict[str, Any] = {"rank": value if axis == "rank" else 8}
    if axis == "sites":
        projections = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
        lora |= {"target_modules": projections, "layers_to_transform": list(range(value))}
    if axis == "experts":
        lora |= {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}
    base = base_of(axis, value)
    tokens = random_tokens(f"4x{value}" if axis == "length" else "4x64")
    with ExitStack() as stack:
        arms = {name: make_arm(name, base, stack, **lora) for name in ARMS}
        seconds = in_turn(arms, tokens, rounds, steps, limit=1e9)
    reference = seconds[REFERENCE]
    row: dict[str, Any] = {"axis": axis, "value": value, "reference_ms": 1000 * statistics.median(reference)}
    row["of_medians"] = {name: statistics.median(each) / statistics.median(reference) for name, each in seconds.items()}
    row["of_minima"] = {name: min(each) / min(reference) for name, each in seconds.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="of an arm in a round")
    parser.add_argument("--axes", nargs="+", choices=GROWTH, default=list(GROWTH))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    for axis in options.axes:
        for value in GROWTH[axis]:
            row = measure(axis, value, options.rounds, options.steps)
            said = "   ".join(f"{name} {ratio:.3f}" for name, ratio in row["of_medians"].items() if name != REFERENCE)
            print(f"{axis} {value}: {row['reference_ms']:.0f} ms; {said}", flush=True)
            rows.append(row)
            options.output.write_text(json.dumps({"where": where("cpu"), "rows": rows}, indent=1))
    print(f"took {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
