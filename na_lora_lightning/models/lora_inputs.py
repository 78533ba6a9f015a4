"""Keeps the inputs of LoRA layers in the base model's dtype until the backward pass.

With float32 adapters on a bfloat16 base, PEFT casts the input of each LoRA layer to float32, and autograd keeps each of
these copies for the gradient of A. The copies hold nothing that the bfloat16 input does not: here autograd keeps that
one, which layers with a common input share, and it is cast once more in the backward pass. Losses and gradients are
bitwise the same. Under autocast the copy is of no use at all, as the product is taken in 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from na_lora_lightning.core.lora_layers import active_adapters, adds_output_of_b, is_lora_layer, is_on_parameter, lora_a


class _CastProduct(torch.autograd.Function):
    """x·Aᵀ in the dtype of A, of which x is kept in its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return functional.linear(x.to(weight.dtype), weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        to_input = to_weight = None
        with torch.autocast(gradient.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                to_input = (gradient @ weight).to(x.dtype)
            if ctx.needs_input_grad[1]:
                # In the order in which autograd multiplies, for bitwise the same result.
                to_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2).to(weight.dtype)
        return to_input, to_weight


class CastingLinear(nn.Linear):
    """A linear layer that takes inputs of lower precision than its weight and answers in the weight's."""

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        if input.dtype == self.weight.dtype or torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        product: Tensor = _CastProduct.apply(input, self.weight)
        return product if self.bias is None else product + self.bias


def keep_inputs_uncast(model: nn.Module) -> int:
    """Has the LoRA layers of a model keep their inputs in the base model's dtype.

    Left as they are: layers with dropout, whose input is another after it; variants such as DoRA, which use the input
    otherwise; LoRA on parameters.

    Args:
        model: A PEFT model.

    Returns:
        Number of matrices A to which it applies.
    """
    changed = 0
    for layer in model.modules():
        if not is_lora_layer(layer) or is_on_parameter(layer) or not active_adapters(layer):
            continue
        held: list[str] = list(layer.lora_B)  # type: ignore[arg-type]
        if not all(_takes_any_dtype(layer, adapter) for adapter in held):
            continue
        for adapter in held:
            lora_a(layer, adapter).__class__ = CastingLinear
            changed += 1
        # PEFT's own switch, that of peft.helpers.disable_input_dtype_casting.
        layer.cast_input_dtype_enabled = False  # type: ignore[assignment]
    return changed


def _takes_any_dtype(layer: nn.Module, adapter: str) -> bool:
    plain = adds_output_of_b(layer, adapter) and type(lora_a(layer, adapter)) in (nn.Linear, CastingLinear)
    return plain and isinstance(layer.lora_dropout[adapter], nn.Identity)  # type: ignore[index]
