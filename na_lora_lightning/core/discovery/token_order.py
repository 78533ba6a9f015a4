"""In which order a layer is given the tokens: sample after sample, as masks say them, or time step after time step.

A batch of every sample twice shows it: what comes again as a whole stands sample after sample, and what comes again
within each time step stands time step after time step. Another token in the second half shows whether tokens that are
given as rows alone stand in their order within a sample.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from na_lora_lightning.core.discovery.trace import LinearCall, Trace
from na_lora_lightning.core.discovery.tracing import first_argument
from na_lora_lightning.core.sites import GateSite

# One order has to fit this much better than the other, and a token's row has to change at least this much of what
# another does.
_BETTER, _OWN = 0.5, 0.1


def set_token_order(sites: Collection[GateSite], root: nn.Module, trace: Trace) -> None:
    """Sets ``time_first`` of each site.

    Args:
        sites: Sites that were found.
        root: The model.
        trace: Its traced forward pass.
    """
    samples = trace.samples
    first: dict[nn.Module, LinearCall] = {}
    for call in trace.linear_calls:
        first.setdefault(call.module, call)
    unclear = {
        site.lora_layer: first[site.lora_layer].source
        for site in sites
        if site.experts is None and site.picked_from is None and samples is not None
        if site.lora_layer in first and not _is_evident(first[site.lora_layer].source, samples)
    }
    if samples is None or not unclear:
        return
    inputs = {name: _twice(value) if _is_of(value, samples) else value for name, value in trace.inputs.items()}
    twice = inputs_of_layers(root, trace, inputs, unclear)
    order = {layer: _is_time_first(source, twice.get(layer), samples) for layer, source in unclear.items()}
    flat = {layer for layer, source in unclear.items() if source.ndim == 2 and order[layer] is not None}
    if flat & set(twice):
        other = _with_another_token(inputs, samples)
        changed = inputs_of_layers(root, trace, {**inputs, **other}, flat)
        lengths = {value.shape[1] for value in other.values()}
        for layer in flat & set(changed):
            if not _is_in_order(twice[layer], changed[layer], samples, lengths, bool(order[layer])):
                order[layer] = None
    for site in sites:
        site.time_first = order.get(site.lora_layer, False)


def _is_of(value: Any, samples: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == samples


def _twice(values: Tensor, axis: int = 0) -> Tensor:
    return torch.cat([values, values], dim=axis)


def _with_another_token(inputs: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """Of inputs that hold tokens, with the last but one of each sample in the second half replaced by its first."""
    changed: dict[str, Any] = {}
    for name, value in inputs.items():
        holds_tokens = name.endswith("input_ids") or (isinstance(value, Tensor) and value.ndim == 3)
        if holds_tokens and _is_of(value, 2 * samples) and value.shape[1] > 2:
            changed[name] = value.clone()
            changed[name][samples:, -2] = value[samples:, 0]
    return changed


def _is_evident(source: Tensor, samples: int) -> bool:
    """Whether samples come first by the shape, or each is one row."""
    one_each = source.numel() == samples * source.shape[-1]
    return one_each or (source.ndim > 2 and source.shape[0] == samples != source.shape[1])


def inputs_of_layers(
    root: nn.Module, trace: Trace, inputs: Mapping[str, Any], layers: Collection[nn.Module]
) -> dict[nn.Module, Tensor]:
    """What layers are given first in a forward pass without a graph.

    Args:
        root: The model.
        trace: An earlier forward pass of it.
        inputs: Keyword arguments.
        layers: The layers.

    Returns:
        ``[..., features]`` of each that was called; nothing where the model does not take these arguments.
    """
    given: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.setdefault(layer, first_argument(args, kwargs).detach())

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        try:
            trace.shards.entry(root)(**inputs)
        except Exception:  # Whatever a model raises that is for batches of one size.
            return {}
        finally:
            trace.shards.reshard()
    return given


def _is_time_first(source: Tensor, twice: Tensor | None, samples: int) -> bool | None:
    """Whether time steps come first; None where samples stand in yet another order."""
    rows = source.detach().reshape(-1, source.shape[-1]).float()
    if twice is None or twice.numel() != 2 * rows.numel() or len(rows) % samples:
        return source.ndim == 3 and source.shape[1] == samples != source.shape[0]
    again = twice.reshape(-1, rows.shape[-1]).float()
    steps = rows.view(-1, samples, rows.shape[-1])
    by_sample = float((again - _twice(rows)).abs().mean())
    by_step = float((again - _twice(steps, 1).flatten(0, 1)).abs().mean())
    if by_step < _BETTER * by_sample:
        return True if source.ndim in (2, 3) else None
    return False if by_sample < _BETTER * by_step or by_sample == by_step else None


def _is_in_order(twice: Tensor, changed: Tensor, samples: int, lengths: set[int], time_first: bool) -> bool:
    """Whether the last row but one of a sample is that of its last token but one, as far as can be told.

    Args:
        twice: Rows of a batch that holds ``samples`` twice, ``[rows, features]``.
        changed: Those where the second half has another last token but one.
        samples: Of a half.
        lengths: Of the sequences that were changed.
        time_first: Whether time steps come first.
    """
    length = len(twice) // (2 * samples)
    if twice.shape != changed.shape or length not in lengths:
        return True
    distance = (changed - twice).float().norm(dim=-1)
    by_sample = distance.view(length, -1).T if time_first else distance.view(-1, length)
    return bool(by_sample[:, -2].max() >= _OWN * distance.max())
