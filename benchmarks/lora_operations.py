"""Operations and memory of one optimizer step, as ratios to PEFT's LoRA; exact, so that a busy machine does not matter.

On a CPU operations are those that a GPU would launch: views, allocations and what is counted by its parts are left out,
and operations on lists of tensors count once. They are counted with the fused AdamW of all arms, which this package's
modules and transformers' Trainer use, and with the one that torch makes by default, which steps parameter by parameter.
With ``--device cuda`` they are the kernels that a GPU ran. Memory is the most that tensors take at once in a step at
8 × 512 tokens, the model included, with float32 adapters on a bfloat16 base of 6 layers of 576 × 1536. ::

    python benchmarks/lora_operations.py [--what operations memory] [--device cuda]

The exit status is 1 where a ratio is above its bound.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import warnings
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lora_arms import ARMS, REFERENCE, SIZES, VOCABULARY, Arm, base_model, kernels_of, make_arm
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from na_lora_lightning.core.observation import taken_rows

# Views, allocations, copies of scalars and layouts, and operations that are counted by what they call.
_FREE = """
    view reshape transpose t permute expand slice select unsqueeze squeeze detach detach_ as_strided alias unflatten
    flatten _unsafe_view empty empty_like empty_strided new_empty new_empty_strided resize_ split split_with_sizes
    narrow lift_fresh is_nonzero item _local_scalar_dense result_type unbind to _to_copy contiguous clone zeros
    zeros_like ones ones_like matmul linear dropout chunk view_as numpy_T movedim expand_as set_ stride conj
    resolve_conj _reshape_alias sum_to_size full scaled_dot_product_attention scalar_tensor swapaxes mT isfinite
"""
BOUNDS = {"NA-LoRA on PEFT's layers": 1.02, "NA-LoRA, 128 tokens a site": 0.85, "memory": 0.80}


def launches(events: Any) -> collections.Counter[str]:
    """Names of what a step launches, with counts."""
    found: collections.Counter[str] = collections.Counter()
    free = frozenset(_FREE.split())
    for event in events:
        name = event.name.removeprefix("aten::")
        outer, inside = event.cpu_parent, False
        while outer is not None:
            # A CPU has no operations on lists of tensors; and a scalar factor is no copy on a GPU.
            inside |= outer.name.startswith("aten::_foreach")
            # Gradients are in the layout of parameters there.
            inside |= outer.name == "torch::autograd::AccumulateGrad"
            inside |= name == "copy_" and outer.name in (
                "aten::mul",
                "aten::add",
                "aten::pow",
                "aten::div",
                "aten::rsub",
            )
            outer = outer.cpu_parent
        if event.name.startswith("aten::") and name not in free and not inside:
            found[name] += 1
    return found


def step_counts(device: str, fused: bool | None) -> dict[str, tuple[int, collections.Counter[str]]]:
    """Operations of one step of a Llama of 30 small layers, or kernels on a GPU, by arm; and which, on a CPU."""
    found: dict[str, tuple[int, collections.Counter[str]]] = {}
    base = base_model(SIZES["narrow"], device=device)
    tokens = torch.randint(0, VOCABULARY, (4, 64), device=device)
    # As many rows are evaluated at once as on a GPU.
    like_a_gpu = patch.object(taken_rows, "_MOST_ELEMENTS_ON_CPU", taken_rows._MOST_ELEMENTS)
    for name in (REFERENCE, "NA-LoRA on PEFT's layers", *ARMS[2:]):
        with ExitStack() as stack:
            stack.enter_context(like_a_gpu)
            arm = make_arm(name, base, stack, fused, rank=8)
            for _ in range(3):
                arm.step(tokens)
            if device == "cuda":
                found[name] = kernels_of(lambda arm=arm: arm.step(tokens))["kernels"], collections.Counter()
                continue
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                arm.step(tokens)
            which = launches(profiled.events())
            found[name] = which.total(), which
    return found


def operations(options: argparse.Namespace, results: dict[str, Any]) -> bool:
    """Prints the ratios; whether they are within their bounds."""
    within = True
    for optimizer, fused in (("fused", True), ("default", None)):
        counts = step_counts(options.device, fused)
        plain, of_plain = counts[REFERENCE]
        for arm, (count, which) in counts.items():
            ratio, bound = count / plain, BOUNDS.get(arm)
            holds = bound is None or ratio <= bound
            within &= holds
            said = "" if bound is None else f", at most {bound:.2f}: {'yes' if holds else 'NO'}"
            more = (which - of_plain).most_common(4)
            more_said = f"; more: {more}" if more else ""
            print(f"{arm}, AdamW {optimizer}: {count} operations a step, ratio {ratio:.3f}{said}{more_said}")
            results.setdefault(arm, {})[optimizer] = {"operations": count, "of_operations": ratio}
    return within


class _Memory(TorchDispatchMode):
    """Adds up what tensors take, from when an operation makes them to when the last view of them goes."""

    def __init__(self) -> None:
        super().__init__()
        self._known: set[weakref.ref[torch.UntypedStorage]] = set()
        self.taken = self.highest = 0

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes()

        def release(gone: weakref.ref[torch.UntypedStorage]) -> None:
            self._known.discard(gone)
            self.taken -= size

        reference = weakref.ref(storage, release)
        if reference not in self._known:
            self._known.add(reference)
            self.taken += size
            self.highest = max(self.highest, self.taken)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, result)
        return result


def peak_bytes(name: str, device: str) -> int:
    """The most that tensors take at once in two steps; without a GPU, on a device that keeps sizes and no numbers."""
    base = base_model(SIZES["small"], "bfloat16")
    with ExitStack() as stack:
        arm = make_arm(name, base, stack)
        model = arm.model.to("meta" if device == "cpu" else device)
        tokens = torch.zeros(8, 512, dtype=torch.long, device=model.device)
        # A device without numbers has no fused optimizer; the other takes hardly more.
        arm = Arm(model, fused=True if device == "cuda" else None)
        if device == "cuda":
            for _ in range(2):
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated() - arm.held_bytes()
                arm.step(tokens)
                torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        with _Memory() as watched:
            for tensor in (*model.parameters(), *model.buffers(), tokens):
                watched.add(tensor)
            for _ in range(2):
                arm.step(tokens)
        return watched.highest


def memory(options: argparse.Namespace, results: dict[str, Any]) -> bool:
    """Prints the ratios; whether they are within their bounds."""
    peft = peak_bytes(REFERENCE, options.device)
    within = True
    for arm in (REFERENCE, "LoRA", "PEFT DoRA", "DoRA"):
        found = peak_bytes(arm, options.device)
        holds = arm != "LoRA" or found <= BOUNDS["memory"] * peft
        said = f", at most {BOUNDS['memory']:.2f}: {'yes' if holds else 'NO'}" if arm == "LoRA" else ""
        print(f"{arm}: {found / 2**20:.0f} MiB at most at once, ratio {found / peft:.3f}{said}")
        within &= holds
        results.setdefault(arm, {}).update(peak_mib=found / 2**20, of_peak=found / peft)
    return within


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--what", nargs="+", default=["operations", "memory"], choices=["operations", "memory"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, help="file for the numbers, as JSON")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    within = [operations(options, results)] if "operations" in options.what else []
    within += [memory(options, results)] if "memory" in options.what else []
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"device": options.device, "arms": results}, indent=1))
    sys.exit(0 if all(within) else 1)


if __name__ == "__main__":
    main()
