"""LoRA layers that compute what PEFT's do in fewer passes over memory, and keep less for the backward pass.

The layer stays PEFT's: its parameters, names, adapters, files and methods. Only its forward is another, of a subclass,
and whatever that does not cover goes to PEFT's own, from one call to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.pytorch_utils import Conv1D

from na_lora_lightning.core.lora_layers import is_lora_layer, observed_now, only_observed
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.models.dora_functions import DoRAProduct
from na_lora_lightning.models.lora_functions import LoRAProduct, LoRASetting, autocast_dtype
from na_lora_lightning.models.lora_inputs import CastingLinear
from na_lora_lightning.models.lora_siblings import Member, Siblings, families
from na_lora_lightning.peft_internals import LoRALinear, is_plain_dora

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The last has shapes alone, with which memory is estimated.
_PLAIN = (nn.Parameter, Tensor, FakeTensor)
_HOOKED = "hooks on parts of it"
# By the names that they have in torch 2.6 as in 2.14.
_HOOKS_OF_ALL_MODULES = [
    getattr(nn.modules.module, f"_global_{kind}_hooks")
    for kind in ("forward_pre", "forward", "backward_pre", "backward")
]


class FastLoRALinear(LoRALinear):
    """PEFT's LoRA of a linear layer, with LoRA or DoRA of one adapter as one autograd function."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``; takes what PEFT's layer takes."""
        if args or any(value is not None for value in kwargs.values()) or _is_other_call(x):
            return super().forward(x, *args, **kwargs)
        parts = _parts(self)
        if isinstance(parts, str):
            return super().forward(x, *args, **kwargs)
        weight, a, given_x = parts.weight, parts.a, x
        autocast = autocast_dtype(x.device)
        if autocast is not None:
            if torch.float64 in (x.dtype, weight.dtype, a.dtype):
                # Which autocast leaves alone.
                return super().forward(x, *args, **kwargs)
            x = x.to(autocast)
        elif x.dtype != weight.dtype:
            return super().forward(x, *args, **kwargs)
        base, matrix_b, dropout = parts.base, parts.matrix_b, parts.dropout
        setting = LoRASetting(
            scaling=float(self.scaling[parts.adapter]),
            dropout=float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
            transposed=type(base) is Conv1D,
            base_dtype=autocast or weight.dtype,
            rank_dtype=autocast or a.dtype,
        )
        if parts.magnitude is not None:
            result, rank_activations = DoRAProduct.apply(x, weight, parts.bias, a, parts.b, parts.magnitude, setting)
        else:
            found = _with_siblings(self, given_x, x, parts, setting)
            result, rank_activations = found or LoRAProduct.apply(
                x, weight, parts.bias, a, parts.b, parts.bias_b, setting
            )
        for module, given in ((base, x), (matrix_b, rank_activations)):
            if module._forward_hooks and observed_now(module):
                with torch.no_grad():
                    module(given)
        return result


def _with_siblings(
    layer: FastLoRALinear, given: Tensor, x: Tensor, parts: _Parts, setting: LoRASetting
) -> tuple[Tensor, Tensor] | None:
    """A layer's result and rank activations where those that are given the same input are computed at once."""
    siblings: Siblings | None = vars(layer).get("_siblings")
    if siblings is None or setting.rank_dtype != setting.base_dtype:
        return None
    dtype = setting.base_dtype
    if siblings.layers[0] is not layer:
        return siblings.take(layer, given, _member(layer, parts), dtype)
    members = []
    for each in siblings.layers:
        of_each = parts if each is layer else _parts(each) if isinstance(each, FastLoRALinear) else ""
        if isinstance(of_each, str) or not _is_plain(of_each, parts):
            return None
        members.append(_member(each, of_each))
    return siblings.answer(given, x, members, dtype)


def _member(layer: nn.Module, parts: _Parts) -> Member:
    return Member(parts.weight, parts.bias, parts.a, parts.b, float(layer.scaling[parts.adapter]))  # type: ignore[index]


def _is_plain(parts: _Parts, first: _Parts) -> bool:
    """Whether a layer is LoRA alone, its A and B are trained alone, and its dtypes are those of the first sibling."""
    frozen = (parts.weight, parts.bias)
    return (
        type(parts.base) is nn.Linear
        and parts.magnitude is None
        and parts.bias_b is None
        and not (isinstance(parts.dropout, nn.Dropout) and parts.dropout.training and parts.dropout.p)
        and parts.a.requires_grad
        and parts.b.requires_grad
        and not any(each is not None and each.requires_grad for each in frozen)
        and (parts.weight.dtype, parts.a.dtype) == (first.weight.dtype, first.a.dtype)
    )


def _is_other_call(x: Tensor) -> bool:
    """Whether a call is to be traced, compiled or differentiated in ways that an autograd function does not support."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or x.dtype not in _FLOATING
        # PEFT makes a matrix of a vector with DoRA.
        or x.ndim < 2
        or any(_HOOKS_OF_ALL_MODULES)
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


class _Parts(NamedTuple):
    """What a LoRA layer is computed of; the tensors are those of PEFT's modules as they are now."""

    adapter: str
    base: nn.Module
    matrix_b: nn.Module
    dropout: nn.Module
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    bias_b: Tensor | None
    magnitude: Tensor | None


def _parts(layer: FastLoRALinear) -> _Parts | str:
    """The parts of a layer as it is now, or why it is computed as PEFT does it.

    It runs in each call, and reads what modules hold past ``nn.Module.__getattr__``, which takes most of the time
    otherwise.
    """
    modules = layer._modules
    held = modules["lora_B"]._modules  # type: ignore[union-attr]
    adapters = [name for name in layer.active_adapters if name in held]
    if layer.disable_adapters or layer.merged or not adapters:
        return "no adapter of it is in use, or it is merged"
    if len(adapters) > 1:
        return "several adapters of it are active at once"
    (adapter,) = adapters
    base, matrix_b = modules["base_layer"], held[adapter]
    matrix_a = modules["lora_A"]._modules[adapter]  # type: ignore[union-attr]
    dropout = modules["lora_dropout"]._modules[adapter]  # type: ignore[union-attr]
    assert base is not None
    assert matrix_a is not None
    assert matrix_b is not None
    assert dropout is not None
    if type(base) not in (nn.Linear, Conv1D):
        return f"its base layer is a {type(base).__name__}"
    if type(matrix_a) not in (nn.Linear, CastingLinear) or type(matrix_b) is not nn.Linear:
        return f"its adapter is made of {type(matrix_a).__name__} and {type(matrix_b).__name__}"
    if type(dropout) not in (nn.Identity, nn.Dropout) or (isinstance(dropout, nn.Dropout) and dropout.inplace):
        return f"its dropout is a {type(dropout).__name__}"
    weight, a, b = _held(base, "weight"), _held(matrix_a, "weight"), _held(matrix_b, "weight")
    bias, bias_b = _held(base, "bias"), _held(matrix_b, "bias")
    magnitude: Tensor | None = None
    if matrix_a._forward_hooks or not all(map(only_observed, (base, matrix_a, matrix_b, dropout))):
        return _HOOKED
    if adapter in layer.lora_variant:
        if not is_plain_dora(layer, adapter):
            return f"its adapter is a {type(layer.lora_variant[adapter]).__name__.removesuffix('LinearVariant')}"
        if bias_b is not None:
            return "DoRA with a bias of lora_B"
        if isinstance(dropout, nn.Dropout):
            return "DoRA with dropout, where PEFT multiplies by the base layer twice"
        of_magnitude = layer.lora_magnitude_vector[adapter]
        if not only_observed(of_magnitude):
            return _HOOKED
        magnitude = _held(of_magnitude, "weight")
    for tensor in (weight, a, b, bias, bias_b, magnitude):
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN:
            return "its weights are of a class of their own, as quantised and distributed ones are"
        if tensor.dtype not in _FLOATING:
            return "its weights are not floating-point numbers"
    if not weight.device == a.device == b.device:
        return "its weights are on several devices"
    if a.dtype != b.dtype:
        return "its A and B are of different dtypes"
    return _Parts(adapter, base, matrix_b, dropout, weight, bias, a, b, bias_b, magnitude)


def _held(module: nn.Module, name: str) -> Any:
    held = module._parameters
    return held[name] if name in held else getattr(module, name)


def why_left(layer: nn.Module) -> str | None:
    """Why a LoRA layer is computed as PEFT does it, as it is now; None where it is not."""
    if not isinstance(layer, FastLoRALinear):
        return _why_not_replaced(layer)
    parts = _parts(layer)
    return parts if isinstance(parts, str) else None


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
    for layer in model.modules():
        vars(layer).pop("_siblings", None)
    for layers in families(model, FastLoRALinear):
        siblings = Siblings(layers)
        for layer in layers:
            vars(layer)["_siblings"] = siblings
    return lora_layer_report(model)
