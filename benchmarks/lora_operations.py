"""Operations and memory of one optimizer step, as ratios to PEFT's LoRA; exact, so that a busy machine does not matter.

Operations are those that a GPU would launch: views, allocations and what is counted by its parts are left out, and what
the optimizer does to all parameters at once counts for each of them, or once with ``--foreach_as_one``.
Memory is the most that tensors take at once in a step at 8 × 512 tokens, the model included, with float32 adapters on a
bfloat16 base of 6 layers of 576 × 1536. ::

    python benchmarks/lora_operations.py [--what operations memory] [--foreach_as_one]

The exit status is 1 where a ratio is above its bound.
"""

from __future__ import annotations

import argparse
import collections
import sys
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import LlamaConfig, LlamaForCausalLM

from na_lora_lightning import ImportanceOptions, StepScaleOptions, nonlinearity_aware, use_fast_lora_layers

# Views, allocations, copies of scalars and layouts, and operations that are counted by what they call.
_FREE = """
    view reshape transpose t permute expand slice select unsqueeze squeeze detach detach_ as_strided alias unflatten
    flatten _unsafe_view empty empty_like empty_strided new_empty new_empty_strided resize_ split split_with_sizes
    narrow lift_fresh is_nonzero item _local_scalar_dense result_type unbind to _to_copy contiguous clone zeros
    zeros_like ones ones_like matmul linear dropout chunk view_as numpy_T movedim expand_as set_ stride conj
    resolve_conj _reshape_alias sum_to_size full scaled_dot_product_attention scalar_tensor swapaxes mT isfinite
"""
BOUNDS = {"NA-LoRA on PEFT's layers": 1.02, "NA-LoRA": 0.85, "memory": 0.80}


def model(fast: bool, dora: bool = False, **sizes: int) -> PeftModel:
    """A Llama with LoRA on all linear layers."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, num_attention_heads=4, num_key_value_heads=4, **sizes)
    adapted: PeftModel = get_peft_model(
        LlamaForCausalLM(config),  # type: ignore[assignment, arg-type]
        LoraConfig(r=8, target_modules="all-linear", use_dora=dora),
    )
    use_fast_lora_layers(adapted, enable=fast)
    return adapted


def stepping(trained: nn.Module, optimizer: AdamW, rows: int, length: int) -> Callable[[], None]:
    """One optimizer step, to be called."""
    tokens = torch.randint(0, 512, (rows, length))

    def step() -> None:
        trained(input_ids=tokens, labels=tokens, attention_mask=torch.ones_like(tokens)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def launches(events: Any, by_parameter: bool) -> collections.Counter[str]:
    """Names of what a step launches, with counts."""
    found: collections.Counter[str] = collections.Counter()
    free = frozenset(_FREE.split())
    for event in events:
        name = event.name.removeprefix("aten::")
        outer, inside = event.cpu_parent, False
        while outer is not None:
            # A CPU has no operations on lists of tensors; and a scalar factor is no copy on a GPU.
            inside |= outer.name.startswith("aten::_foreach") and not by_parameter
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


def count(fast: bool, by_parameter: bool, dora: bool = False, **mechanisms: Any) -> collections.Counter[str]:
    """Launches of one step of a Llama of 30 small layers."""
    trained = model(fast, dora, hidden_size=64, intermediate_size=192, num_hidden_layers=30)
    optimizer = AdamW([parameter for parameter in trained.parameters() if parameter.requires_grad], foreach=True)
    step = stepping(trained, optimizer, 4, 64)
    with nonlinearity_aware(trained, optimizer, measure_every=0, **mechanisms) if mechanisms else nullcontext():
        for _ in range(3):
            step()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            step()
    return launches(profiled.events(), by_parameter)


def operations(by_parameter: bool) -> bool:
    """Prints the ratios; whether they are within their bounds."""
    both = {"importance": ImportanceOptions(warmup_steps=0, refresh_every=10), "step_scale": StepScaleOptions()}
    plain = count(False, by_parameter)
    within = True
    print(f"PEFT LoRA: {plain.total()} operations a step")
    for arm, counted in {
        "LoRA": count(True, by_parameter),
        "NA-LoRA on PEFT's layers": count(False, by_parameter, **both),
        "NA-LoRA": count(True, by_parameter, **both),
        "PEFT DoRA": count(False, by_parameter, dora=True),
        "DoRA": count(True, by_parameter, dora=True),
    }.items():
        ratio, bound = counted.total() / plain.total(), BOUNDS.get(arm)
        holds = bound is None or ratio <= bound
        within &= holds
        said = "" if bound is None else f", at most {bound:.2f}: {'yes' if holds else 'NO'}"
        print(f"{arm}: {counted.total()}, ratio {ratio:.3f}{said}; more: {(counted - plain).most_common(4)}")
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


def peak_bytes(fast: bool, dora: bool = False) -> int:
    """The most that tensors take at once in two steps, on a device that keeps sizes and no numbers."""
    trained = model(fast, dora, hidden_size=576, intermediate_size=1536, num_hidden_layers=6)
    for name, parameter in trained.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    trained = trained.to("meta")
    optimizer = AdamW([parameter for parameter in trained.parameters() if parameter.requires_grad])
    tokens = torch.zeros(8, 512, dtype=torch.long, device="meta")
    with _Memory() as watched:
        for tensor in (*trained.parameters(), *trained.buffers(), tokens):
            watched.add(tensor)
        for _ in range(2):
            trained(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return watched.highest


def memory() -> bool:
    """Prints the ratios; whether they are within their bounds."""
    peft = peak_bytes(False)
    print(f"PEFT LoRA: {peft / 2**20:.0f} MiB at most at once")
    ours = peak_bytes(True)
    holds = ours <= BOUNDS["memory"] * peft
    said = f"at most {BOUNDS['memory']:.2f}: {'yes' if holds else 'NO'}"
    print(f"LoRA: {ours / 2**20:.0f} MiB, ratio {ours / peft:.3f}, {said}")
    for arm, fast in (("PEFT DoRA", False), ("DoRA", True)):
        found = peak_bytes(fast, dora=True)
        print(f"{arm}: {found / 2**20:.0f} MiB, ratio {found / peft:.3f}")
    return holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--what", nargs="+", default=["operations", "memory"], choices=["operations", "memory"])
    parser.add_argument(
        "--foreach_as_one", action="store_true", help="count what the optimizer does to all parameters once"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    within = [operations(not options.foreach_as_one)] if "operations" in options.what else []
    within += [memory()] if "memory" in options.what else []
    sys.exit(0 if all(within) else 1)


if __name__ == "__main__":
    main()
