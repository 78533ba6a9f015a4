"""Time of one optimizer step, as ratios to PEFT's LoRA: LoRA and DoRA of both, and NA-LoRA on layers of ours.

All arms train a Llama with LoRA of rank 16 on all linear layers, in turn, in one process. The floor is the frozen
model, forward and backward to its input. On a CPU it is processor time of one thread, on a GPU the time until it is
done, with kernels, utilisation (the part of the time in which a kernel runs) and memory beside it. ::

    OMP_NUM_THREADS=1 python benchmarks/lora_step.py [--rounds 16] [--tokens 8x64 4x512]
    python benchmarks/lora_step.py --device cuda --models small large --dtypes bfloat16 float32 \
        --tokens 8x64 4x512 8x512 --output step.json

The exit status is 1 where a ratio on the small model, of the minima or of the medians, is above its bound.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
import traceback
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lora_arms import ARMS, DTYPES, REFERENCE, SIZES, Arm, base_model, kernels_of, make_arm, random_tokens, where
from torch import Tensor

BOUNDS = {
    "LoRA": 0.92,
    "NA-LoRA, 128 tokens a site": 0.95,
    "NA-LoRA, all tokens": 1.00,
    "DoRA": 1.05,
}
_UNCOUNTED = 2


def seconds_of(arm: Arm, tokens: Tensor, steps: int) -> float:
    """Of a step: processor time, or on a GPU the time until it is done."""
    if not tokens.is_cuda:
        start = time.process_time()
        for _ in range(steps):
            arm.step(tokens)
        return (time.process_time() - start) / steps
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        arm.step(tokens)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def in_turn(arms: dict[str, Arm], tokens: Tensor, rounds: int, steps: int, limit: float) -> dict[str, list[float]]:
    """Seconds of each arm in each round, those of the first rounds left out."""
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    order, began = list(arms), time.perf_counter()
    for turn in range(rounds + _UNCOUNTED):
        # No arm always comes after the same other one.
        shift = turn % len(order)
        for name in itertools.chain(order[shift:], order[:shift]):
            seconds[name].append(seconds_of(arms[name], tokens, steps))
        if turn == 0 and time.perf_counter() - began > limit / 4:
            steps = 1
        if turn >= _UNCOUNTED + 2 and time.perf_counter() - began > limit:
            break
    return {arm: each[_UNCOUNTED:] for arm, each in seconds.items()}


def on_device(arm: Arm, tokens: Tensor, seconds: float) -> dict[str, Any]:
    """What is to be known of a step on a GPU beside its time."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    arm.step(tokens)
    torch.cuda.synchronize()
    found: dict[str, Any] = {"peak_mib": (torch.cuda.max_memory_allocated() - before + arm.held_bytes()) / 2**20}
    found |= kernels_of(lambda: arm.step(tokens))
    return found | {"utilisation": found["busy_ms"] / 1000 / seconds}


def measure(size: str, dtype: str, shapes: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each shape and arm."""
    base = base_model(SIZES[size], dtype, options.device)
    rows = []
    with ExitStack() as stack:
        arms = {name: make_arm(name, base, stack) for name in options.arms}
        for shape in shapes:
            tokens = random_tokens(shape, options.device)
            seconds = in_turn(arms, tokens, options.rounds, options.steps, options.limit)
            reference = seconds[REFERENCE]
            for name, each in seconds.items():
                row: dict[str, Any] = {"model": size, "dtype": dtype, "tokens": shape, "arm": name}
                row |= {"median_ms": 1000 * statistics.median(each), "minimum_ms": 1000 * min(each)}
                row["of_medians"] = statistics.median(each) / statistics.median(reference)
                row["of_minima"] = min(each) / min(reference)
                row["rounds"] = len(each)
                if tokens.is_cuda:
                    row |= on_device(arms[name], tokens, statistics.median(each))
                rows.append(row)
    return rows


def report(rows: list[dict[str, Any]]) -> bool:
    """Prints a table, and says whether all ratios on the small model are within their bounds."""
    within = True
    for row in rows:
        if row["arm"] == "floor":
            print(f"{row['model']}, {row['dtype']}, {row['tokens']} tokens, {row['rounds']} rounds")
        bound = BOUNDS.get(row["arm"]) if row["model"] == "small" else None
        holds = bound is None or max(row["of_minima"], row["of_medians"]) <= bound
        within &= holds
        said = "" if bound is None else f"  at most {bound:.2f}: {'yes' if holds else 'NO'}"
        if "kernels" in row:
            said = f"  {row['kernels']:5} kernels  busy {row['utilisation']:4.0%}  {row['peak_mib']:7.0f} MiB" + said
        times = f"{row['median_ms']:9.2f} ms   medians {row['of_medians']:.3f}   minima {row['of_minima']:.3f}"
        print(f"  {row['arm']:27}{times}{said}", flush=True)
    return within


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["small"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"], help="of the base model")
    parser.add_argument("--tokens", nargs="+", default=["8x64", "4x512"], help="rows x length")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1, help="of an arm in a round")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no further round begins")
    parser.add_argument("--output", type=Path, help="file for the rows, as JSON")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.device == "cpu":
        torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    within, began = True, time.perf_counter()
    for size, dtype in itertools.product(options.models, options.dtypes):
        try:
            new = measure(size, dtype, options.tokens, options)
        except RuntimeError:
            # What one model cannot do, for memory say, is no reason to lose the others.
            traceback.print_exc()
            within = False
            continue
        within &= report(new)
        rows += new
        if options.output:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps({"where": where(options.device), "rows": rows}, indent=1))
    print(f"took {time.perf_counter() - began:.0f} s")
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
