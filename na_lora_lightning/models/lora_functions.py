"""A linear layer with LoRA as one autograd function.

PEFT computes what an adapter adds in passes of their own over whole activations (cast, dropout, product, scale, add),
and autograd goes through each of them once more. Here the adapter's products are added to those of the base layer where
these stand, and autograd keeps the layer's input and the rank activations alone.

With x ``[tokens, in]``, W ``[out, in]``, A ``[r, in]``, B ``[out, r]``, the scaling s, and d what dropout leaves of x::

    h = d·Aᵀ        y = x·Wᵀ + bias + s·(h·Bᵀ + bias_B)
    ḡ = s·∂y·B      ∂x = ∂y·W + drop(ḡ·A)      ∂A = ḡᵀ·d      ∂B = s·∂yᵀ·h
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class LoRASetting(NamedTuple):
    """What of a LoRA layer is no tensor.

    Attributes:
        scaling: s.
        dropout: Probability with which an element of the input is dropped; 0 outside of training.
        transposed: Whether W is kept as ``[in, out]`` (GPT-2's ``Conv1D``).
        base_dtype: In which the base layer is computed: autocast's, or that of W.
        rank_dtype: In which the adapter is computed: autocast's, or that of A.
    """

    scaling: float
    dropout: float
    transposed: bool
    base_dtype: torch.dtype
    rank_dtype: torch.dtype


def rows_of(values: Tensor) -> Tensor:
    """``[..., features]`` as ``[tokens, features]``."""
    return values.reshape(-1, values.shape[-1])


def in_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values.to(dtype)``, which takes its time where there is nothing to do too."""
    return values if values.dtype == dtype else values.to(dtype)


def scaled_product(one: Tensor, other: Tensor, factor: float) -> Tensor:
    """``factor · one · other`` of two matrices, without a pass for the factor."""
    unread = torch.empty(1, 1, dtype=one.dtype, device=one.device)
    return torch.addmm(unread, one, other, beta=0.0, alpha=factor)


def empty_answer(x: Tensor, across: Tensor) -> Tensor:
    """``[..., out]`` for x ``[..., in]`` and a matrix ``[in, out]``, to be written.

    Models change what a layer answers in place, which autograd forbids for views from a function, and what torch
    answers with a bias is one.
    """
    return x.new_empty(*x.shape[:-1], across.shape[1])


def added_products(x: Tensor, across: Tensor, h: Tensor, b: Tensor, factor: float, bias: Tensor | None) -> Tensor:
    """``x·across + factor · h·b + bias`` of matrices of one dtype, ``[..., out]``.

    The small product comes first, as the large one adds to what it finds without a pass of its own.
    """
    result = empty_answer(x, across)
    y = rows_of(result)
    _write_product(y, h, b, bias, factor)
    y.addmm_(rows_of(x), across)
    return result


def _write_product(y: Tensor, one: Tensor, other: Tensor, bias: Tensor | None, factor: float = 1.0) -> None:
    # With a beta of 0 what is there is not read.
    torch.addmm(y if bias is None else bias, one, other, beta=0.0 if bias is None else 1.0, alpha=factor, out=y)


def gradient_of_b(gradient: Tensor, h: Tensor, scaling: float) -> Tensor:
    """``s·∂yᵀ·h``, ``[out, r]``."""
    if gradient.is_cpu:
        # Many rows and few columns take a third longer there than few rows and many columns.
        return scaled_product(h.t(), gradient, scaling).t()
    return scaled_product(gradient.t(), h, scaling)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """In which autocast multiplies on a device; None where it is off, or where a device, such as "meta", has none."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products in the dtypes of their factors."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def _drop(x: Tensor, adapter_dtype: torch.dtype, setting: LoRASetting) -> tuple[Tensor, Tensor | None]:
    """What dropout leaves of x, in the adapter's dtype of computation, and what it kept; drawn as PEFT draws it."""
    if not setting.dropout:
        return in_dtype(x, setting.rank_dtype), None
    dropped, kept = torch.native_dropout(in_dtype(x, adapter_dtype), setting.dropout, True)
    return in_dtype(dropped, setting.rank_dtype), kept


def _dropped_again(values: Tensor, kept: Tensor | None, setting: LoRASetting) -> Tensor:
    return values if kept is None else values * rows_of(kept) * (1.0 / (1.0 - setting.dropout))


class LoRAProduct(torch.autograd.Function):
    """y = x·Wᵀ + bias + s·(h·Bᵀ + bias_B), and h, through which no gradient flows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        bias_b: Tensor | None,
        setting: LoRASetting,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`torch.autograd.Function`; x is in the base layer's dtype."""
        ctx.set_materialize_grads(False)
        with without_autocast(x.device):
            matrix, matrix_b = in_dtype(weight, setting.base_dtype), in_dtype(b, setting.rank_dtype)
            across = matrix if setting.transposed else matrix.t()
            of_base = None if bias is None else in_dtype(bias, setting.base_dtype)
            dropped, kept = _drop(x, a.dtype, setting)
            rank_activations = functional.linear(dropped, in_dtype(a, setting.rank_dtype))
            del dropped
            h = rows_of(rank_activations)
            if setting.rank_dtype == setting.base_dtype:
                result = added_products(x, across, h, matrix_b.t(), setting.scaling, of_base)
                y = rows_of(result)
            else:
                result = empty_answer(x, across)
                y = rows_of(result)
                _write_product(y, rows_of(x), across, of_base)
                y.add_(h @ matrix_b.t(), alpha=setting.scaling)
            if bias_b is not None:
                y.add_(in_dtype(bias_b, setting.rank_dtype), alpha=setting.scaling)
        _, of_weight, _, of_a, of_b, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if of_weight or of_a or of_b else None, weight, a, b, rank_activations if of_b else None, kept
        )
        ctx.setting, ctx.shape, ctx.dtypes = setting, x.shape, [None if t is None else t.dtype for t in (bias, bias_b)]
        ctx.mark_non_differentiable(rank_activations)
        return result, rank_activations

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the arguments."""
        x, weight, a, b, rank_activations, kept = ctx.saved_tensors
        setting: LoRASetting = ctx.setting
        of_x, of_weight, of_bias, of_a, of_b, of_bias_b, _ = ctx.needs_input_grad
        to_x = to_weight = to_bias = to_a = to_b = to_bias_b = None
        if gradients[0] is None:
            return (None,) * 7
        gradient = rows_of(gradients[0])
        with without_autocast(gradient.device):
            in_rank = in_dtype(gradient, setting.rank_dtype)
            matrix_a, matrix_b = in_dtype(a, setting.rank_dtype), in_dtype(b, setting.rank_dtype)
            through_b: Any = scaled_product(in_rank, matrix_b, setting.scaling) if of_x or of_a else None
            if of_x:
                matrix = in_dtype(weight, setting.base_dtype)
                matrix = matrix.t() if setting.transposed else matrix
                of_adapter = _dropped_again(through_b @ matrix_a, kept, setting)
                if setting.rank_dtype == setting.base_dtype:
                    to_x = of_adapter.addmm_(gradient, matrix)
                else:
                    to_x = (gradient @ matrix).add_(of_adapter)
                to_x = to_x.view(ctx.shape)
            if of_weight:
                by_rows = gradient.t() @ rows_of(x)
                to_weight = (by_rows.t() if setting.transposed else by_rows).to(weight.dtype)
            if of_a or (of_b and torch.is_grad_enabled()):
                dropped = _dropped_again(in_dtype(rows_of(x), setting.rank_dtype), kept, setting)
            if of_a:
                to_a = in_dtype(through_b.t() @ dropped, a.dtype)
            if of_b:
                # To be differentiated again, h has to be made of what it depends on.
                h = dropped @ matrix_a.t() if torch.is_grad_enabled() else rows_of(rank_activations)
                to_b = in_dtype(gradient_of_b(in_rank, h, setting.scaling), b.dtype)
            if of_bias:
                to_bias = gradient.sum(0).to(ctx.dtypes[0])
            if of_bias_b:
                to_bias_b = (in_rank.sum(0) * setting.scaling).to(ctx.dtypes[1])
        return to_x, to_weight, to_bias, to_a, to_b, to_bias_b, None
