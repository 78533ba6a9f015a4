"""LoRA layers that compute what PEFT's do in fewer passes over memory, and keep less for the backward pass.

The layer stays PEFT's: its parameters, names, adapters, files and methods. Only its forward is another, of a subclass,
and whatever that does not cover goes to PEFT's own, from one call to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from na_lora_lightning.core.lora_layers import active_adapters, is_lora_layer, observed_now, only_observed
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.models.dora_functions import DoRAProduct
from na_lora_lightning.models.lora_functions import LoRAProduct, LoRASetting, autocast_dtype
from na_lora_lightning.models.lora_inputs import CastingLinear
from na_lora_lightning.peft_internals import LoRALinear, is_plain_dora

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class FastLoRALinear(LoRALinear):
    """PEFT's LoRA of a linear layer, with LoRA or DoRA of one adapter as one autograd function."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``; takes what PEFT's layer takes."""
        if args or any(value is not None for value in kwargs.values()) or why_left(self) or _is_other_call(x):
            return super().forward(x, *args, **kwargs)
        (adapter,) = active_adapters(self)
        base, matrix_a, matrix_b = self.base_layer, self.lora_A[adapter], self.lora_B[adapter]
        weight: Tensor = base.weight  # type: ignore[assignment]
        a: Tensor = matrix_a.weight  # type: ignore[assignment]
        b: Tensor = matrix_b.weight  # type: ignore[assignment]
        autocast = autocast_dtype(x.device)
        if autocast is not None:
            if torch.float64 in (x.dtype, weight.dtype, a.dtype):
                # Which autocast leaves alone.
                return super().forward(x, *args, **kwargs)
            x = x.to(autocast)
        elif x.dtype != weight.dtype:
            return super().forward(x, *args, **kwargs)
        setting = LoRASetting(
            scaling=float(self.scaling[adapter]),
            dropout=_dropout(self, adapter),
            transposed=isinstance(base, Conv1D),
            base_dtype=autocast or weight.dtype,
            rank_dtype=autocast or a.dtype,
        )
        if adapter in self.lora_variant:
            magnitude = self.lora_magnitude_vector[adapter].weight
            result, rank_activations = DoRAProduct.apply(x, weight, base.bias, a, b, magnitude, setting)
        else:
            result, rank_activations = LoRAProduct.apply(x, weight, base.bias, a, b, matrix_b.bias, setting)
        for module, given in ((base, x), (matrix_b, rank_activations)):
            if module._forward_hooks and observed_now(module):
                with torch.no_grad():
                    module(given)
        return result


def _dropout(layer: LoRALinear, adapter: str) -> float:
    dropout = layer.lora_dropout[adapter]
    return float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _is_other_call(x: Tensor) -> bool:
    """Whether a call is to be traced, compiled or differentiated in ways that an autograd function does not support."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or x.dtype not in _FLOATING
        # PEFT makes a matrix of a vector with DoRA.
        or x.ndim < 2
        or nn.modules.module._has_any_global_hook()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def why_left(layer: nn.Module) -> str | None:
    """Why a LoRA layer is computed as PEFT does it, as it is now; None where it is not."""
    if not isinstance(layer, FastLoRALinear):
        return _why_not_replaced(layer)
    adapters = active_adapters(layer)
    if layer.disable_adapters or layer.merged or not adapters:
        return "no adapter of it is in use, or it is merged"
    if len(adapters) > 1:
        return "several adapters of it are active at once"
    (adapter,) = adapters
    base, matrix_a, matrix_b = layer.base_layer, layer.lora_A[adapter], layer.lora_B[adapter]
    if type(base) not in (nn.Linear, Conv1D):
        return f"its base layer is a {type(base).__name__}"
    if type(matrix_a) not in (nn.Linear, CastingLinear) or type(matrix_b) is not nn.Linear:
        return f"its adapter is made of {type(matrix_a).__name__} and {type(matrix_b).__name__}"
    dropout = layer.lora_dropout[adapter]
    if type(dropout) not in (nn.Identity, nn.Dropout) or (isinstance(dropout, nn.Dropout) and dropout.inplace):
        return f"its dropout is a {type(dropout).__name__}"
    parts: list[nn.Module] = [base, matrix_a, matrix_b, dropout]
    tensors = [base.weight, base.bias, matrix_a.weight, matrix_b.weight, matrix_b.bias]
    if adapter in layer.lora_variant:
        if not is_plain_dora(layer, adapter):
            return f"its adapter is a {type(layer.lora_variant[adapter]).__name__.removesuffix('LinearVariant')}"
        if matrix_b.bias is not None:
            return "DoRA with a bias of lora_B"
        if isinstance(dropout, nn.Dropout):
            return "DoRA with dropout, where PEFT multiplies by the base layer twice"
        parts.append(layer.lora_magnitude_vector[adapter])
        tensors.append(layer.lora_magnitude_vector[adapter].weight)
    if matrix_a._forward_hooks or not all(only_observed(part) for part in parts):
        return "hooks on parts of it"
    if any(type(tensor) not in (nn.Parameter, Tensor) for tensor in tensors if tensor is not None):
        return "its weights are of a class of their own, as quantised and distributed ones are"
    if any(tensor.dtype not in _FLOATING for tensor in tensors if tensor is not None):
        return "its weights are not floating-point numbers"
    if len({base.weight.device, matrix_a.weight.device, matrix_b.weight.device}) > 1:
        return "its weights are on several devices"
    if matrix_a.weight.dtype != matrix_b.weight.dtype:
        return "its A and B are of different dtypes"
    return None


def _why_not_replaced(layer: nn.Module) -> str | None:
    if "forward" in vars(layer):
        return "its forward is replaced, as accelerate does for several devices"
    if type(layer) is not LoRALinear:
        return f"PEFT adapts it by a layer of its own, {type(layer).__name__}"
    return None


@dataclass(frozen=True)
class LoRALayerReport:
    """Which LoRA layers of a model are computed in one autograd function, as the model is now.

    Attributes:
        fast: Their names.
        left: Names of the others, which are computed as PEFT does it, by the reason why.
    """

    fast: tuple[str, ...] = ()
    left: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """The report in lines, one for each reason."""
        total = len(self.fast) + sum(map(len, self.left.values()))
        yield f"{len(self.fast)} of {total} LoRA layers are computed as one function each."
        for reason, names in self.left.items():
            some = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
            yield f"As PEFT computes them: {some}: {reason}."


def lora_layer_report(model: nn.Module) -> LoRALayerReport:
    """Says how the LoRA layers of a model are computed, as it is now."""
    fast: list[str] = []
    left: dict[str, list[str]] = {}
    for name, layer in model.named_modules():
        if not (is_lora_layer(layer) or hasattr(layer, "lora_embedding_A")):
            continue
        reason = why_left(layer) if isinstance(layer, FastLoRALinear) else _why_not_replaced(layer) or _SWITCHED_OFF
        if reason is None:
            fast.append(name)
        else:
            left.setdefault(reason, []).append(name)
    return LoRALayerReport(tuple(fast), {reason: tuple(names) for reason, names in left.items()})


_SWITCHED_OFF = "use_fast_lora_layers was not called, or switched them off"


def use_fast_lora_layers(model: nn.Module, enable: bool = True) -> LoRALayerReport:
    """Has the LoRA layers of a PEFT model compute the same in fewer passes over memory, or as PEFT does it again.

    A base layer, what its adapter adds, and their gradients become one autograd function (LoRA, rsLoRA and DoRA; linear
    layers and GPT-2's ``Conv1D``). Outputs and gradients are PEFT's to rounding, and dropout draws the same random
    numbers. Parameters, names, adapters, merging and files stay as they are. What a layer has to compute otherwise, as
    a batch with ``adapter_names``, several active adapters, hooks on its parts, or a graph of ``torch.compile``, goes
    to PEFT's forward from one call to the next.

    Args:
        model: A PEFT model, before ``fully_shard``. It is changed in place; a second call changes nothing.
        enable: False gives the layers back PEFT's forward.

    Returns:
        Which layers are computed so now, and why the others are not.

    Raises:
        ConfigurationError: ``fully_shard`` has made other classes of the layers already.
    """
    now, then = (LoRALinear, FastLoRALinear) if enable else (FastLoRALinear, LoRALinear)
    for name, layer in model.named_modules():
        if not isinstance(layer, now) or isinstance(layer, FastLoRALinear) is enable:
            continue
        if type(layer) is now:
            if "forward" not in vars(layer):
                layer.__class__ = then
        elif now in type(layer).__bases__ and type(layer).__name__ == f"FSDP{now.__name__}":
            raise ConfigurationError(
                f"{name} is sharded by fully_shard, which has made a class of its own of the layer; call "
                "use_fast_lora_layers before fully_shard."
            )
    return lora_layer_report(model)
