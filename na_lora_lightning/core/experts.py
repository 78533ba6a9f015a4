"""Stacked experts: which token and which expert each row of an activation's input belongs to.

transformers keeps the matrices of all experts of a layer in one parameter ``[experts, out, in]`` and PEFT adapts it
with one pair of matrices: expert e owns the columns ``e::E`` of ``lora_B`` and the rows ``e·r:(e+1)·r`` of
``lora_A``; the rows of ``lora_B``, one for each output feature, are shared by all experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from na_lora_lightning.core.lora_layers import is_linear, is_lora_layer, is_on_parameter
from na_lora_lightning.core.pre_activations import GATE_METHOD

Arrangement = Literal["sorted", "in_token_order", "one_block_each"]


@dataclass(eq=False)
class Experts:
    """The experts behind one gate site.

    Attributes:
        count: Number of experts E.
        owner: The module that holds the stacked parameters; its forward is given the routing.
        arrangement: Order of the rows of a pre-activation. ``"sorted"``: all pairs of token and expert in the order
            of the experts; ``"in_token_order"``: the same, token by token; ``"one_block_each"``: ``[E, tokens,
            channels]``, zero where a token is not routed to an expert. An implementation that calls the activation
            once per expert is recognised by itself.
    """

    count: int
    owner: nn.Module
    arrangement: Arrangement


def stacked_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters ``[experts, ·, ·]`` of a module of stacked experts.

    Args:
        module: Any module.

    Returns:
        Its parameters by name: one or two that make the pre-activation and the other branch, then one that takes the
        gated result. Empty where the module is something else: where it has linear layers of its own (a Mamba
        block), nothing to apply an activation with (a recurrent unit), or other shapes.
    """
    own = {name: p for name, p in module._parameters.items() if p is not None and p.ndim == 3}
    stacked = {name: p for name, p in own.items() if p.is_floating_point() and "bias" not in name}
    # Scales of layers are [channels, 1, 1].
    if len(stacked) not in (2, 3) or any(min(p.shape) < 2 for p in stacked.values()):
        return {}
    children = list(module.children())
    has_activation = hasattr(module, GATE_METHOD) or any(not any(True for _ in c.parameters()) for c in children)
    if not has_activation or any(is_linear(child) for child in children):
        return {}
    sizes = [p.shape[1] * p.shape[2] for p in stacked.values()]
    fits = sizes[0] in (sizes[1], 2 * sizes[1]) if len(sizes) == 2 else len(set(sizes)) == 1
    return stacked if fits else {}


def expert_owners(root: nn.Module) -> Iterator[tuple[str, nn.Module, list[tuple[str, nn.Module]]]]:
    """Modules that hold stacked experts, each with its name and the PEFT wrappers around it, outermost first."""
    wrappers: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in root.named_modules():
        inner = getattr(module, "base_layer", None)
        if is_lora_layer(module) and is_on_parameter(module) and isinstance(inner, nn.Module):
            wrappers[id(inner)] = [*wrappers.get(id(module), []), (name, module)]
        elif stacked_parameters(module):
            yield name, module, wrappers.get(id(module), [])


@dataclass(eq=False)
class RoutedCall:
    """One forward call of an experts module.

    Attributes:
        tokens: Number of tokens T.
        index: Expert of each choice of each token, ``[T, top_k]``, or None where the call has none.
        activations: Calls of the activation so far.
    """

    tokens: int
    index: Tensor | None
    activations: int = 0
    _rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def routed_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> RoutedCall:
    """Reads the routing from the arguments of an experts module: the first integer matrix among them."""
    values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    hidden = values[0]
    index = next((v for v in values[1:] if not v.is_floating_point() and v.ndim == 2), None)
    tokens = hidden.numel() // hidden.shape[-1] if index is None else index.shape[0]
    return RoutedCall(tokens, index)


def experts_of_rows(experts: Experts, call: RoutedCall, pre_activation: Tensor) -> Tensor:
    """Expert of each row of a pre-activation, ``[rows]`` int64; for the discovery, which checks it.

    Args:
        experts: The experts, with a supposed arrangement.
        call: The call of the experts module.
        pre_activation: ``[..., channels]``.
    """
    rows = pre_activation.numel() // pre_activation.shape[-1]
    if experts.arrangement == "one_block_each":
        return torch.arange(experts.count, device=pre_activation.device).repeat_interleave(rows // experts.count)
    assert call.index is not None
    if rows != call.index.numel():
        return torch.full((rows,), experts_in_use(experts, call)[call.activations], device=pre_activation.device)
    flat = call.index.reshape(-1)
    return torch.sort(flat).values if experts.arrangement == "sorted" else flat


def experts_in_use(experts: Experts, call: RoutedCall) -> list[int]:
    """Experts that some token is routed to, in ascending order."""
    assert call.index is not None
    found: list[int] = torch.unique(call.index).tolist()
    return [expert for expert in found if expert < experts.count]
