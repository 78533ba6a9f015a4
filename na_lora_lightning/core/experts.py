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
from na_lora_lightning.core.token_selection import TokenSelection
from na_lora_lightning.errors import DataError

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
    if len(stacked) not in (2, 3) or any(p.shape[0] < 2 for p in stacked.values()):
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
        return torch.full((rows,), _hit(experts, call)[call.activations], device=pre_activation.device)
    flat = call.index.reshape(-1)
    return torch.sort(flat).values if experts.arrangement == "sorted" else flat


def _hit(experts: Experts, call: RoutedCall) -> list[int]:
    """Experts that some token is routed to, in ascending order."""
    assert call.index is not None
    found: list[int] = torch.unique(call.index).tolist()
    return [expert for expert in found if expert < experts.count]


def look_at(
    experts: Experts, call: RoutedCall, selection: TokenSelection, pre_activation: Tensor, name: str
) -> tuple[Tensor, Tensor]:
    """The looked-at rows of a pre-activation and how much each counts for each expert.

    Args:
        experts: The experts of the site.
        call: The call of the experts module under way.
        selection: Which tokens count and are looked at.
        pre_activation: z, ``[rows, channels]`` or ``[E, tokens, channels]``.
        name: Site, for the message.

    Returns:
        ``[looked-at rows, channels]`` without a graph, and weights ``[E, looked-at rows]``, float32.

    Raises:
        DataError: The rows do not follow from the routing, or the padding mask does not fit the tokens.
    """
    flat = pre_activation.detach().reshape(-1, pre_activation.shape[-1])
    if experts.arrangement == "one_block_each":
        tokens = flat.shape[0] // experts.count
        chosen, weight = selection.chosen(tokens, flat.device, name)
        block = torch.arange(experts.count, device=flat.device)[:, None]
        rows = (block * tokens + chosen).reshape(-1)
        looked_at = flat.index_select(0, rows)
        counted = weight.repeat(experts.count) * (looked_at != 0).any(dim=1)
        return looked_at, _by_expert(experts.count, block.expand(-1, chosen.numel()).reshape(-1), counted)
    if call.index is None:
        raise DataError(
            f"the experts of {name!r} were called without a table of the experts of each token, so tokens cannot be "
            "told from padding; exclude these experts from the LoRA targets."
        )
    chosen, weight = selection.chosen(call.tokens, flat.device, name)
    if flat.shape[0] == call.index.numel():
        rows, of_row = _all_at_once(experts, call.index, chosen)
        return flat.index_select(0, rows), _by_expert(
            experts.count, of_row, weight.repeat_interleave(call.index.shape[1])
        )
    hit = _hit(experts, call)
    expert = hit[min(call.activations, len(hit) - 1)]
    (token,) = (call.index == expert).T.nonzero(as_tuple=True)[1:]
    if call.activations >= len(hit) or token.numel() != flat.shape[0]:
        raise DataError(
            f"the pre-activation of {name!r} has {flat.shape[0]} rows, which does not follow from the routing of "
            f"{call.tokens} tokens; use another experts implementation (config._experts_implementation)."
        )
    per_token = torch.zeros(call.tokens, device=flat.device).index_add_(0, chosen, weight)
    counted = per_token.index_select(0, token)
    rows = counted.nonzero(as_tuple=True)[0]
    of_row = torch.full((rows.numel(),), expert, device=flat.device)
    return flat.index_select(0, rows), _by_expert(experts.count, of_row, counted.index_select(0, rows))


def _all_at_once(experts: Experts, index: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the chosen tokens and their experts, where the activation is called once for all experts."""
    of_pair = index.reshape(-1)
    place = torch.arange(of_pair.numel(), device=index.device)
    if experts.arrangement == "sorted":
        # The same call as transformers makes, so that equal experts come in the same order.
        permutation = torch.sort(of_pair).indices
        place = torch.empty_like(permutation).index_copy_(0, permutation, place)
    rows = place.view_as(index).index_select(0, chosen).reshape(-1)
    return rows, index.index_select(0, chosen).reshape(-1)


def _by_expert(count: int, of_row: Tensor, weight: Tensor) -> Tensor:
    """Spreads row weights ``[rows]`` to ``[experts, rows]``; a row of no local expert counts for none."""
    experts = torch.arange(count, device=weight.device)[:, None]
    return (of_row[None] == experts).to(weight) * weight
