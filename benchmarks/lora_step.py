"""Processor time of one optimizer step, as ratios to PEFT's LoRA: LoRA and DoRA of both, and NA-LoRA on layers of ours.

All arms train a Llama of 6 layers of 576 × 1536 with LoRA of rank 16 on all linear layers, one step each in turn, in
one thread and one process. The floor is the frozen model, forward and backward to its input. ::

    OMP_NUM_THREADS=1 python benchmarks/lora_step.py [--rounds 16] [--tokens 8x64 4x512]

The exit status is 1 where a ratio, of the minima or of the medians, is above its bound.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import time
import warnings
from contextlib import ExitStack
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from na_lora_lightning import ImportanceOptions, ObserverOptions, nonlinearity_aware, use_fast_lora_layers

REFERENCE = "PEFT LoRA"
BOUNDS = {
    "LoRA": 0.92,
    "NA-LoRA, 128 tokens a site": 0.95,
    "NA-LoRA, all tokens": 1.00,
    "DoRA": 1.05,
}
_UNCOUNTED = 2


def base_model() -> LlamaForCausalLM:
    """The model of all arms, the same each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    return LlamaForCausalLM(config)


def adapted(base: LlamaForCausalLM, fast: bool, dora: bool = False) -> PeftModel:
    """A copy of the model with LoRA, the same at each call."""
    torch.manual_seed(1)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", use_dora=dora)
    model: PeftModel = get_peft_model(copy.deepcopy(base), config)  # type: ignore[assignment, arg-type]
    use_fast_lora_layers(model, enable=fast)
    return model


def step(model: nn.Module, optimizer: Optimizer | None, tokens: Tensor) -> None:
    """One optimizer step; without an optimizer, forward and backward."""
    model(input_ids=tokens, labels=tokens, attention_mask=torch.ones_like(tokens)).loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def _optimizer(model: nn.Module) -> Optimizer:
    return AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)


def measure(rows: int, length: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each arm in each round, those of the first rounds left out."""
    base = base_model()
    floor = copy.deepcopy(base).requires_grad_(False)
    floor.enable_input_require_grads()
    arms: dict[str, tuple[nn.Module, Any]] = {"floor": (floor, None)}
    for name, fast, dora in (
        (REFERENCE, False, False),
        ("LoRA", True, False),
        ("NA-LoRA, 128 tokens a site", True, False),
        ("NA-LoRA, all tokens", True, False),
        ("PEFT DoRA", False, True),
        ("DoRA", True, True),
    ):
        model = adapted(base, fast, dora)
        arms[name] = model, _optimizer(model)
    tokens = torch.randint(0, 2048, (rows, length))
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    with ExitStack() as stack:
        for arm, looked_at in (("NA-LoRA, 128 tokens a site", 128), ("NA-LoRA, all tokens", None)):
            stack.enter_context(
                nonlinearity_aware(
                    *arms[arm],
                    importance=ImportanceOptions(warmup_steps=0),
                    observer=ObserverOptions(max_tokens=looked_at),
                    measure_every=0,
                )
            )
        order = list(arms)
        for round_index in range(rounds + _UNCOUNTED):
            # No arm always comes after the same other one.
            shift = round_index % len(order)
            for arm in itertools.chain(order[shift:], order[:shift]):
                start = time.process_time()
                step(*arms[arm], tokens)
                seconds[arm].append(time.process_time() - start)
    return {arm: each[_UNCOUNTED:] for arm, each in seconds.items()}


def report(seconds: dict[str, list[float]]) -> bool:
    """Prints the ratios, and says whether all are within their bounds."""
    within = True
    for arm, each in seconds.items():
        of_minima = min(each) / min(seconds[REFERENCE])
        of_medians = statistics.median(each) / statistics.median(seconds[REFERENCE])
        bound = BOUNDS.get(arm)
        holds = bound is None or max(of_minima, of_medians) <= bound
        within &= holds
        said = "" if bound is None else f"  at most {bound:.2f}: {'yes' if holds else 'NO'}"
        print(f"{arm:28}{statistics.median(each):8.3f} s   medians {of_medians:.3f}   minima {of_minima:.3f}{said}")
    return within


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--tokens", nargs="+", default=["8x64", "4x512"], help="rows x length")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    within = True
    for tokens in options.tokens:
        rows, length = map(int, tokens.split("x"))
        print(f"{rows} × {length} tokens, {options.rounds} rounds")
        within &= report(measure(rows, length, options.rounds))
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
