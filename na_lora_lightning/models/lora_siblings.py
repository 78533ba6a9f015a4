"""LoRA layers that are given the same input, as one autograd function.

Query, key and value, and gate and up, read the same activations. The products with their A are one product with all
rows of A, and their gradients of the input are added where the first one stands. Who belongs together is told by
names below one module, so that every pass, and every run, computes the same bits; whether the input is the same tensor
is seen at each call, and a layer that is given another one is computed by itself.

With h = x·[A₁; …; Aₙ]ᵀ, its parts hᵢ, and ḡ = [s₁·∂y₁·B₁, …, sₙ·∂yₙ·Bₙ]::

    yᵢ = x·Wᵢᵀ + biasᵢ + sᵢ·hᵢ·Bᵢᵀ
    ∂x = Σ ∂yᵢ·Wᵢ + ḡ·[A₁; …; Aₙ]      [∂A₁; …; ∂Aₙ] = ḡᵀ·x      ∂Bᵢ = sᵢ·∂yᵢᵀ·hᵢ
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from na_lora_lightning.models.lora_functions import (
    added_products,
    gradient_of_b,
    in_dtype,
    rows_of,
    scaled_product,
    without_autocast,
)

FAMILIES = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))
# There keys and values are made of another network's output.
_ACROSS = ("cross", "encoder_attn", "encdec")


class Member(NamedTuple):
    """A layer's tensors as one call reads them.

    Attributes:
        weight: W, ``[out, in]``; frozen.
        bias: Of the base layer, or None; frozen.
        a: A, ``[r, in]``.
        b: B, ``[out, r]``.
        scaling: s.
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scaling: float


class Siblings:
    """Layers that are given the same input as a rule, in the order in which they are called.

    Attributes:
        layers: At least two; the first one's call computes all of them.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = tuple(layers)
        self._given: Tensor | None = None
        self._ready: dict[int, tuple[Any, tuple[Tensor, Tensor]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Copies begin between two passes."""
        return {**vars(self), "_given": None, "_ready": {}}

    def answer(self, given: Tensor, x: Tensor, members: Sequence[Member], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What the first layer answers; what the others do is kept until they are called.

        Args:
            given: What the layers are called with.
            x: The same in the dtype of computation.
            members: The layers' tensors.
            dtype: In which all of it is computed.
        """
        first, *others = products(x, members, dtype)
        states = [_state_of(given, member, dtype) for member in members[1:]]
        self._given, self._ready = given, dict(enumerate(zip(states, others, strict=True), start=1))
        return first

    def take(self, layer: nn.Module, given: Tensor, member: Member, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """What a layer answers to an input, where the same was computed with the first one; once."""
        if not self._ready:
            return None
        index = next(index for index, each in enumerate(self.layers) if each is layer)
        state, found = self._ready.pop(index, (None, None))
        if self._given is not given or state != _state_of(given, member, dtype):
            self._given, self._ready = None, {}
            return None
        if not self._ready:
            self._given = None
        return found


def _state_of(given: Tensor, member: Member, dtype: torch.dtype) -> tuple[object, ...]:
    """What an answer depends on besides the input: whether it is differentiated, its dtype, and writes into tensors."""
    held = (given, member.weight, member.a, member.b)
    return (
        torch.is_grad_enabled(),
        dtype,
        member.scaling,
        *((id(t), 0 if t.is_inference() else t._version) for t in held),
    )


def families(model: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[nn.Module, ...]]:
    """Layers of a class below one module that by their names are given the same input, attention across left out."""
    for name, parent in model.named_modules():
        if any(part in name.lower() for part in _ACROSS):
            continue
        for family in FAMILIES:
            children = [parent._modules[child] for child in family if child in parent._modules]
            layers = tuple(each for each in children if each is not None and type(each) is kind)
            if len(layers) > 1 and len({layer.in_features for layer in layers}) == 1:
                yield layers


def products(x: Tensor, members: Sequence[Member], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """What each layer answers, ``[..., out]``, and its rank activations, ``[..., r]``, through which nothing flows.

    Args:
        x: ``[..., in]``.
        members: The layers' tensors.
        dtype: In which all of it is computed, that of x.
    """
    scalings = tuple(member.scaling for member in members)
    columns = [[getattr(member, name) for member in members] for name in ("weight", "bias", "a", "b")]
    *results, h = LoRAProducts.apply(x, dtype, scalings, *(tensor for column in columns for tensor in column))
    return list(zip(results, h.split([member.a.shape[0] for member in members], dim=-1), strict=True))


class LoRAProducts(torch.autograd.Function):
    """yᵢ of n layers, and all of h, through which no gradient flows."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dtype: torch.dtype, scalings: tuple[float, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        """See :class:`torch.autograd.Function`; the tensors are n weights, n biases, n matrices A and n matrices B."""
        ctx.set_materialize_grads(False)
        weights, biases, all_a, all_b = _columns(tensors, len(scalings))
        results = []
        with without_autocast(x.device):
            h = functional.linear(x, torch.cat([in_dtype(a, dtype) for a in all_a]))
            parts = rows_of(h).split([a.shape[0] for a in all_a], dim=1)
            for weight, bias, b, part, scaling in zip(weights, biases, all_b, parts, scalings, strict=True):
                of_base = None if bias is None else in_dtype(bias, dtype)
                across, matrix_b = in_dtype(weight, dtype).t(), in_dtype(b, dtype).t()
                results.append(added_products(x, across, part, matrix_b, scaling, of_base))
        ctx.save_for_backward(x, h, *weights, *all_a, *all_b)
        ctx.dtype, ctx.scalings = dtype, scalings
        ctx.mark_non_differentiable(h)
        return (*results, h)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients in the order of the arguments; a layer whose answer was not used has none."""
        x, h, *saved = ctx.saved_tensors
        count, dtype = len(ctx.scalings), ctx.dtype
        weights, all_a, all_b = _columns(saved, count)
        of_a: list[Tensor | None] = [None] * count
        of_b: list[Tensor | None] = [None] * count
        to_x: Any = None
        used = {index: rows_of(each) for index, each in enumerate(gradients[:count]) if each is not None}
        if not used:
            return (None,) * (3 + 4 * count)
        ranks = [a.shape[0] for a in all_a]
        with without_autocast(x.device):
            through_b = _side_by_side([(each, in_dtype(all_b[i], dtype), ctx.scalings[i]) for i, each in used.items()])
            if ctx.needs_input_grad[0]:
                to_x = through_b @ torch.cat([in_dtype(all_a[index], dtype) for index in used])
                for index, each in used.items():
                    to_x.addmm_(each, in_dtype(weights[index], dtype))
                to_x = to_x.view(x.shape)
            parts = rows_of(h).split(ranks, dim=1)
            to_a = (through_b.t() @ rows_of(x)).split([ranks[index] for index in used])
            for (index, each), part in zip(used.items(), to_a, strict=True):
                of_a[index] = in_dtype(part, all_a[index].dtype)
                # To be differentiated again, h has to be made of what it depends on.
                again = torch.is_grad_enabled()
                h_of_each = rows_of(x) @ in_dtype(all_a[index], dtype).t() if again else parts[index]
                of_b[index] = in_dtype(gradient_of_b(each, h_of_each, ctx.scalings[index]), all_b[index].dtype)
        return (to_x, None, None, *[None] * (2 * count), *of_a, *of_b)


def _side_by_side(factors: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """``[s₁·∂y₁·B₁, …]``, each product written where it belongs unless it is to be differentiated again."""
    if torch.is_grad_enabled():
        return torch.cat([scaled_product(*each) for each in factors], dim=1)
    ends = list(accumulate(b.shape[1] for _, b, _ in factors))
    gradient = factors[0][0]
    result = gradient.new_empty(len(gradient), ends[-1])
    for (each, b, scaling), end in zip(factors, ends, strict=True):
        torch.addmm(each.new_empty(1, 1), each, b, beta=0.0, alpha=scaling, out=result[:, end - b.shape[1] : end])
    return result


def _columns(tensors: Sequence[Any], count: int) -> list[list[Any]]:
    return [list(tensors[start : start + count]) for start in range(0, len(tensors), count)]
