"""Losses of a model with LoRA on layers of this package and of PEFT, step by step, on the same batches. ::

    OMP_NUM_THREADS=1 python benchmarks/curves.py --model .cache/quickstart/SmolLM2-135M-Instruct [--steps 200]

LoRA of rank 16 is on all linear layers of the last blocks, or of all of them; AdamW is fused. Rounding alone sets the
curves apart, which Adam enlarges where a gradient is nearly zero. It writes ``benchmarks/results/curves.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from lora_arms import Arm, adapted, where
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

RESULTS = Path(__file__).parent / "results" / "curves.json"


def losses(base: nn.Module, fast: bool, batches: list[Tensor], blocks: int | None) -> list[float]:
    """Of each step."""
    layers = base.config.num_hidden_layers  # type: ignore[union-attr]
    last = list(range(layers - (blocks or layers), layers))
    names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    arm = Arm(adapted(base, fast, target_modules=names, layers_to_transform=last))
    return [arm.step(tokens).item() for tokens in batches]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a model, or its name on the hub")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--blocks", type=int, help="how many of the last have LoRA; all of them by default")
    parser.add_argument("--tokens", default="2x16", help="rows x length")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    rows, length = map(int, options.tokens.split("x"))
    generator = torch.Generator().manual_seed(0)
    # A few batches over and over, so that there is something to learn.
    few = [torch.randint(0, 1000, (rows, length), generator=generator) for _ in range(8)]
    batches = [few[step % len(few)] for step in range(options.steps)]
    ours, theirs = (losses(base, fast, batches, options.blocks) for fast in (True, False))
    difference = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    print(f"{theirs[0]:.3f} to {theirs[-1]:.3f} in {options.steps} steps; largest difference {difference:.2e}")
    found = {"where": where("cpu"), "steps": options.steps, "tokens": options.tokens, "blocks": options.blocks}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        json.dumps(found | {"first": theirs[0], "last": theirs[-1], "largest_difference": difference}, indent=1)
    )


if __name__ == "__main__":
    main()
