"""What ``lora_step.py`` and ``lora_operations.py`` compare: one model, adapted by PEFT and by this package, and a step.

All arms of a model share its frozen weights, and each has an adapter of its own, the same at the start.
"""

from __future__ import annotations

import copy
import os
import platform
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.optim import AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from na_lora_lightning import (
    ImportanceOptions,
    ObserverOptions,
    StepScaleOptions,
    nonlinearity_aware,
    use_fast_lora_layers,
)

REFERENCE = "PEFT LoRA"
SIZES: dict[str, dict[str, int]] = {
    "narrow": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 30, "num_attention_heads": 4},
    "small": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "large": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
VOCABULARY = 2048


def base_model(size: dict[str, Any], dtype: str = "float32", device: str = "cpu") -> LlamaForCausalLM:
    """A Llama with random weights, the same each time."""
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **size)).to(DTYPES[dtype])


def adapted(base: nn.Module, fast: bool, dora: bool = False, rank: int = 16, **options: Any) -> PeftModel:
    """The model with LoRA on all linear layers, float32, on layers of this package or of PEFT."""
    torch.manual_seed(1)
    options = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "use_dora": dora} | options
    config = LoraConfig(**options)
    model: PeftModel = get_peft_model(_sharing(base), config)  # type: ignore[assignment, arg-type]
    use_fast_lora_layers(model, enable=fast)
    return model


def random_tokens(shape: str, device: str = "cpu") -> Tensor:
    """The same for each shape, such as 8x64: rows and their length."""
    rows, length = map(int, shape.split("x"))
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)


def _sharing(base: nn.Module) -> Any:
    """Another model of the same frozen weights."""
    base.requires_grad_(False)
    return copy.deepcopy(base, {id(each): each for each in (*base.parameters(), *base.buffers())})


def optimizer_of(model: nn.Module, fused: bool | None = True) -> Optimizer:
    """AdamW as this package's modules and transformers' Trainer make it, or with ``fused=None`` as torch does."""
    return AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4, fused=fused)


class Arm:
    """A model and its optimizer, stepped on any batch.

    Args:
        model: What is trained; without trained parameters, forward and backward to its inputs.
        fused: Of the optimizer.
    """

    def __init__(self, model: nn.Module, fused: bool | None = True) -> None:
        self.model = model.train()
        self.optimizer = optimizer_of(model, fused) if any(each.requires_grad for each in model.parameters()) else None

    def step(self, tokens: Tensor) -> Tensor:
        """One optimizer step, and its loss."""
        # transformers reads a mask's values, and a device that keeps sizes alone has none.
        mask = None if tokens.is_meta else torch.ones_like(tokens)
        loss: Tensor = self.model(input_ids=tokens, labels=tokens, attention_mask=mask).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()

    def held_bytes(self) -> int:
        """Of the model and of the optimizer's state."""
        state = {} if self.optimizer is None else self.optimizer.state
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [value for each in state.values() for value in each.values() if isinstance(value, Tensor)]
        return sum(each.numel() * each.element_size() for each in tensors)


def make_arm(name: str, base: nn.Module, stack: ExitStack, fused: bool | None = True, **lora: Any) -> Arm:
    """The arm of a name, from those below; hooks are taken off when the stack is left."""
    if name == "floor":
        model = _sharing(base)
        model.enable_input_require_grads()
        return Arm(model)
    arm = Arm(adapted(base, "PEFT" not in name, "DoRA" in name, **lora), fused)
    if name.startswith("NA-LoRA"):
        looked_at = None if "all tokens" in name else 128
        options: dict[str, Any] = {"importance": ImportanceOptions(warmup_steps=0), "step_scale": StepScaleOptions()}
        observer = ObserverOptions(max_tokens=looked_at)
        options |= {"measure_every": 1 if name == MEASURED else 0, "allow_unmasked_gates": True}
        stack.enter_context(
            nonlinearity_aware(arm.model, arm.optimizer, observer=observer, **options)  # type: ignore[arg-type]
        )
    return arm


# What a step costs from which curves are drawn; all others are without.
MEASURED = "NA-LoRA, on a logging step"
ARMS = ("floor", REFERENCE, "LoRA", "NA-LoRA, 128 tokens a site", "NA-LoRA, all tokens", MEASURED, "PEFT DoRA", "DoRA")


def where(device: str) -> dict[str, Any]:
    """On what it was measured, and how busy that was in the last five minutes."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    found = {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    return found | {"cores": os.cpu_count(), "load": round(os.getloadavg()[1], 1)}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def kernels_of(step: Callable[[], object]) -> dict[str, Any]:
    """What a GPU does in a call: kernels, copies, and for how many milliseconds any of them ran."""
    found: dict[str, Any] = {}
    # Profiling the CPU as well takes longer, and not every version tells of kernels without it.
    for activities in ([ProfilerActivity.CUDA], [ProfilerActivity.CPU, ProfilerActivity.CUDA]):
        torch.cuda.synchronize()
        with profile(activities=activities) as profiled:
            step()
            torch.cuda.synchronize()
        found = counted(profiled.events() or ())
        if found["kernels"]:
            break
    return found


def counted(events: Iterable[Any], device: DeviceType = DeviceType.CUDA) -> dict[str, Any]:
    """The same, of what a profiler recorded."""
    kernels = copies = 0
    spans: list[tuple[float, float]] = []
    for event in events:
        # What programs name by themselves is on the timeline of the device too.
        if event.device_type != device or event.name.startswith(("Optimizer.", "ProfilerStep")):
            continue
        is_copy = event.name.startswith(("Memcpy", "Memset"))
        copies, kernels = copies + is_copy, kernels + (not is_copy)
        spans.append((event.time_range.start, event.time_range.end))
    busy = reached = 0.0
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return {"kernels": kernels, "copies": copies, "busy_ms": busy / 1000}
