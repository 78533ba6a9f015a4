"""A linear layer with DoRA as one autograd function, at nearly the price of LoRA.

PEFT makes B·A by passing an identity through the adapter, and multiplies whole activations by the base layer's output
once more. Here W + s·B·A is made where it is in the dtype of the product, which it then is a factor of, and otherwise a
few rows at a time for their norms alone.

With z = x·Wᵀ + s·h·Bᵀ and c = m / ‖W + s·B·A‖ for each row, whose norm is held fixed as in PEFT::

    y = c ⊙ z + bias        ∂m = Σ ∂y ⊙ z / ‖W + s·B·A‖

and the other gradients are those of LoRA for c ⊙ ∂y.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from na_lora_lightning.models.lora_functions import (
    LoRASetting,
    gradient_of_b,
    in_dtype,
    rows_of,
    scaled_product,
    without_autocast,
)

# Elements of W that are held in single precision at once.
_CHUNK = 2**24


def _row_norms(weight: Tensor, a: Tensor, b: Tensor, setting: LoRASetting) -> tuple[Tensor, Tensor | None]:
    """‖W + s·B·A‖ of each row, and W + s·B·A itself where it is in the dtype of the product.

    Args:
        weight: W, ``[out, in]``.
        a: A.
        b: B.
        setting: Of the layer.

    Returns:
        The norms ``[out]``, in float32 at least; the sum or None.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    if weight.dtype == setting.base_dtype == setting.rank_dtype == wide:
        adapted = torch.addmm(weight, b, a, alpha=setting.scaling)
        return torch.linalg.vector_norm(adapted, dim=1), adapted
    a = a.to(wide)
    parts = [
        torch.linalg.vector_norm(torch.addmm(rows.to(wide), of_rows.to(wide), a, alpha=setting.scaling), dim=1)
        for rows, of_rows in zip(*(each.split(max(1, _CHUNK // weight.shape[1])) for each in (weight, b)), strict=True)
    ]
    return torch.cat(parts), None


class DoRAProduct(torch.autograd.Function):
    """y = c ⊙ z + bias with z = x·Wᵀ + s·h·Bᵀ and c = m / ‖W + s·B·A‖ of each row, whose norm is held fixed; and h."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor,
        setting: LoRASetting,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`torch.autograd.Function`; x is in the base layer's dtype."""
        ctx.set_materialize_grads(False)
        with without_autocast(x.device):
            matrix = weight.t() if setting.transposed else weight
            norm, adapted = _row_norms(matrix, a, b, setting)
            rows = rows_of(x)
            rank_activations = functional.linear(in_dtype(x, setting.rank_dtype), in_dtype(a, setting.rank_dtype))
            if adapted is not None:
                z = rows @ adapted.t()
            else:
                z = rows @ in_dtype(matrix, setting.base_dtype).t()
                z.add_(rows_of(rank_activations) @ in_dtype(b, setting.rank_dtype).t(), alpha=setting.scaling)
            shaped = z.view(*x.shape[:-1], z.shape[-1])
            factor = (magnitude / norm).to(setting.base_dtype)
            y = shaped * factor if bias is None else torch.addcmul(bias.to(setting.base_dtype), shaped, factor)
        _, of_weight, _, of_a, of_b, of_magnitude, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if of_weight or of_a or of_b or of_magnitude else None,
            weight,
            a,
            b,
            magnitude,
            norm,
            rank_activations if of_b else None,
            z if of_magnitude else None,
        )
        ctx.setting, ctx.shape, ctx.dtype_of_bias = setting, x.shape, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(rank_activations)
        return y, rank_activations

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the arguments."""
        x, weight, a, b, magnitude, norm, rank_activations, z = ctx.saved_tensors
        setting: LoRASetting = ctx.setting
        of_x, of_weight, of_bias, of_a, of_b, of_magnitude, _ = ctx.needs_input_grad
        to_x = to_weight = to_bias = to_a = to_b = to_magnitude = None
        if gradients[0] is None:
            return (None,) * 7
        gradient = rows_of(gradients[0])
        with without_autocast(gradient.device):
            matrix = weight.t() if setting.transposed else weight
            matrix_a, matrix_b = in_dtype(a, setting.rank_dtype), in_dtype(b, setting.rank_dtype)
            h: Any = None if rank_activations is None else rows_of(rank_activations)
            if torch.is_grad_enabled():
                # To be differentiated again, these have to be made of what they depend on.
                rows = rows_of(x)
                h = in_dtype(rows, setting.rank_dtype) @ matrix_a.t()
                z = rows @ matrix.to(setting.base_dtype).t() + (h @ matrix_b.t()).to(rows.dtype) * setting.scaling
            if of_bias:
                to_bias = gradient.sum(0).to(ctx.dtype_of_bias)
            factor, products = (magnitude / norm).to(setting.base_dtype), None
            if of_magnitude:
                products = gradient.to(magnitude.dtype) * z
                to_magnitude = products.sum(0) / norm.to(magnitude.dtype)
            if products is None or products.dtype != gradient.dtype or torch.is_grad_enabled():
                gradient = gradient * factor
            else:
                # Memory that is in the cache by now.
                gradient = torch.mul(gradient, factor, out=products)
            in_rank = in_dtype(gradient, setting.rank_dtype)
            through_b: Any = scaled_product(in_rank, matrix_b, setting.scaling) if of_x or of_a else None
            if of_x:
                of_adapter, matrix = through_b @ matrix_a, in_dtype(matrix, setting.base_dtype)
                if setting.rank_dtype == setting.base_dtype:
                    to_x = of_adapter.addmm_(gradient, matrix)
                else:
                    to_x = (gradient @ matrix).add_(of_adapter)
                to_x = to_x.view(ctx.shape)
            if of_weight:
                by_rows = gradient.t() @ rows_of(x)
                to_weight = (by_rows.t() if setting.transposed else by_rows).to(weight.dtype)
            if of_a:
                to_a = (through_b.t() @ in_dtype(rows_of(x), setting.rank_dtype)).to(a.dtype)
            if of_b:
                to_b = gradient_of_b(in_rank, h, setting.scaling).to(b.dtype)
        return to_x, to_weight, to_bias, to_a, to_b, to_magnitude, None
