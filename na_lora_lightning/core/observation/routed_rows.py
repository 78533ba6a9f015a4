"""Which rows of the pre-activations of stacked experts are looked at, and how much each counts."""

from __future__ import annotations

import torch
from torch import Tensor

from na_lora_lightning.core.experts import Experts, RoutedCall, experts_in_use
from na_lora_lightning.core.observation.tokens import TokenSelection
from na_lora_lightning.errors import DataError


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
    hit = experts_in_use(experts, call)
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
