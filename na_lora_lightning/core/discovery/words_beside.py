"""Which gates of a denoiser see its text: those that are given fewer tokens when it has fewer words."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from na_lora_lightning.core.discovery.token_order import inputs_of_layers
from na_lora_lightning.core.discovery.trace import Trace
from na_lora_lightning.core.model_entry import is_mask_of_words
from na_lora_lightning.core.sites import GateSite


def set_sees_words(sites: Collection[GateSite], root: nn.Module, trace: Trace) -> None:
    """Sets ``sees_words`` of each site of a denoiser that can be told of padding in a text.

    Args:
        sites: Sites that were found.
        root: The model.
        trace: Its traced forward pass.
    """
    names = set(inspect.signature(root.forward).parameters)
    words = trace.inputs.get("encoder_hidden_states")
    if "timestep" not in names or not any(map(is_mask_of_words, names)) or not isinstance(words, Tensor):
        return
    first: dict[nn.Module, Tensor] = {}
    for call in trace.linear_calls:
        first.setdefault(call.module, call.source)
    # One vector for each sample is made of no words.
    several = {
        site.lora_layer: first[site.lora_layer].numel()
        for site in sites
        if site.lora_layer in first and first[site.lora_layer].ndim > 2
    }
    given: dict[nn.Module, Tensor] = {}
    if several and words.ndim == 3 and _longest(trace.inputs, words) > 1:
        given = inputs_of_layers(root, trace, _of_one_word(trace.inputs, words.shape[1]), several)
    for site in sites:
        layer = site.lora_layer
        # What cannot be told may see them.
        site.sees_words = layer in several and (layer not in given or given[layer].numel() != several[layer])


def _masks(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {n: v for n, v in inputs.items() if is_mask_of_words(n) and isinstance(v, Tensor) and v.ndim == 2}


def _longest(inputs: Mapping[str, Any], words: Tensor) -> int:
    """Words of the longest text, without padding."""
    masks = list(_masks(inputs).values())
    return min(int(mask.bool().sum(dim=1).max()) for mask in masks) if masks else words.shape[1]


def _of_one_word(inputs: Mapping[str, Any], words: int) -> dict[str, Any]:
    """The same with the first of ``words`` alone, which is real."""
    fewer = dict(inputs)
    for name, value in inputs.items():
        if not isinstance(value, Tensor) or not name.startswith(("encoder_", "text_", "txt_")):
            continue
        if value.ndim > 1 and value.shape[1] == words:
            fewer[name] = value[:, :1]
        elif value.ndim > 1 and value.shape[0] == words:
            fewer[name] = value[:1]
    return fewer | {name: fewer[name].new_ones(fewer[name].shape) for name in _masks(inputs)}
