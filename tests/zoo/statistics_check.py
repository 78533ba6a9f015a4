"""Whether the statistics count exactly the real tokens, each for the network that it goes to.

Padding is told from real tokens without its mask's shape: what stands in padded places is replaced, and the rows of
a pre-activation that come out as before are real; in a decoder that has an encoder, those that the loss depends on.
The expert of a row is found by moving the expert's own matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from zoo.inputs import WORDS
from zoo.tiny_models import loss_of
from zoo.watching import evaluating, look, rows_of_experts

from na_lora_lightning.core.activations import ActivationValues
from na_lora_lightning.core.observation.observer import GateObserver, ObserverOptions
from na_lora_lightning.core.sites import GateSite

SAME = 1e-4
# Inputs that may be padded, and under which names they are told so.
MASKS = {
    "input_ids": ("attention_mask",),
    "pixel_values": ("pixel_attention_mask",),
    "input_features": ("attention_mask", "input_features_mask"),
    "input_values": ("attention_mask", "padding_mask"),
    "encoder_hidden_states": ("encoder_attention_mask",),
}


class OutputSum:
    """Sums the activation's output over tokens."""

    components = 1

    def columns(self, site: GateSite) -> int:
        return site.channels

    def collect(self, values: ActivationValues, token_weight: Tensor) -> Tensor:
        return (token_weight @ values.output).reshape(1, -1)


def statistics_problems(
    root: nn.Module,
    inputs: Mapping[str, Any],
    sites: Sequence[GateSite],
    notes: list[str],
    mixes_padding: bool = False,
) -> list[str]:
    """Compares the observer's sums of one forward pass with sums over rows that are known to be real.

    Args:
        root: The base model inside the PEFT model.
        inputs: Arguments of its forward, with padding where ``attention_mask`` says so.
        sites: Sites whose rows have been checked.
        notes: Takes remarks.
        mixes_padding: Whether what stands in padded places reaches real tokens; then the mask says which are real.
    """
    observer = GateObserver(root, sites, ObserverOptions(max_tokens=None))
    observer.add("output", OutputSum())
    observer.attach()
    try:
        with evaluating(root):
            root(**inputs)
    finally:
        observer.detach()
    statistics = observer.finish_step(None)["output"]
    sizes = [site.networks * site.channels for site in sites]
    tokens = statistics.tokens.split([site.networks for site in sites])
    problems, untold = [], 0
    for site, count, sums in zip(sites, tokens, statistics.sums[0].split(sizes), strict=True):
        seen = look(root, inputs, site)
        z = torch.cat(seen.pre_activations)
        real = _rows_of_streams(root, inputs, site, len(z)) if mixes_padding else None
        real = _real_rows(root, inputs, site, z, mixes_padding) if real is None else real
        if real is None:
            untold += 1
            continue
        own = [torch.ones_like(real)] if site.experts is None else rows_of_experts(root, inputs, site, seen)
        problem = _compare(site, count, sums.view(site.networks, -1), z, real, own)
        problems += [] if problem is None else [problem]
    if untold:
        notes.append(f"statistics of {untold} sites not compared, because replaced padding shows in no token or in all")
    return problems


def _rows_of_streams(root: Any, inputs: Mapping[str, Any], site: GateSite, rows: int) -> Tensor | None:
    """What a decoder's mask says where predicted streams of the same lengths stand behind the text; None elsewhere."""
    of_labels = getattr(root.config, "is_encoder_decoder", False) and "labels" in inputs
    mask = inputs["labels"] >= 0 if of_labels else inputs.get("attention_mask")
    streams = 1 + getattr(root.config, "ngram", 0)
    if mask is None or streams == 1 or "decoder" not in site.lora_layer_name or rows != streams * mask.numel():
        return None
    return mask.bool().repeat(1, streams).flatten()


def _compare(site: GateSite, count: Tensor, sums: Tensor, z: Tensor, real: Tensor, own: Sequence[Tensor]) -> str | None:
    """Compares what was told with the real rows; ``own`` are those of each network."""
    # A row of zeros may be of a real token or not, and adds nothing to the sums.
    silent = (z == 0).all(dim=1)
    output = site.activation.evaluate(z.float()).output
    for network, rows in enumerate(own):
        sure, unsure = int((rows & real & ~silent).sum()), int((rows & silent).sum())
        which = site.name if site.experts is None else f"{site.name} expert {network}"
        if not sure <= int(count[network]) <= sure + unsure:
            return f"{which}: statistics of {int(count[network])} tokens, and {sure} are real"
        if not torch.allclose(sums[network], output[rows & real].sum(0), rtol=1e-3, atol=1e-3):
            return f"{which}: the statistics are of other tokens or channels than the real ones"
    return None


def _real_rows(root: Any, inputs: Mapping[str, Any], site: GateSite, z: Tensor, mixes: bool) -> Tensor | None:
    """Which rows belong to real tokens, ``[rows]``; None where that cannot be told."""
    padded, everything = padded_input(inputs), torch.ones(len(z), dtype=torch.bool)
    if mixes and getattr(root.config, "is_encoder_decoder", False) and "decoder" in site.lora_layer_name:
        # Whether the loss depends on a row says it for the decoder, which sees mixed tokens of the encoder.
        padded = None
    real = everything
    if padded is not None:
        name, mask = padded
        seen = not bool(_rows_that_stay(root, inputs, site, z, name, None).all())
        real = _rows_that_stay(root, inputs, site, z, name, mask) if seen and not mixes else everything
        if seen and bool(real.all()):
            # The model hides what stands in padded places, or mixes it into all tokens.
            said = _rows_of_mask(root, mask, len(z))
            # What is denoised sees nothing of padding in a text beside it.
            is_told = said is not None or name == "encoder_hidden_states"
            real = everything if said is None else said
            padded = None if is_told else padded
        elif not seen:
            padded = None
    if getattr(root.config, "is_encoder_decoder", False) and "labels" in inputs and bool((inputs["labels"] < 0).any()):
        # What is padded in a decoder has no label, and what fills up an encoder's windows is seen by no decoder.
        behind = _rows_behind_loss(root, inputs, site)
        return None if behind is None else real & behind
    return None if padded is not None and (bool(real.all()) or not bool(real.any())) else real


def padded_input(inputs: Mapping[str, Any]) -> tuple[str, Tensor] | None:
    """The name of the input that is padded and its mask, ``[batch, length]``; None where nothing is."""
    for name, masks in MASKS.items():
        for mask in (inputs.get(each) for each in masks if name in inputs):
            if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()):
                return name, mask
    return None


def _rows_of_mask(root: Any, mask: Tensor, rows: int) -> Tensor | None:
    """What a mask says, by the model's own means where there are fewer tokens than it is for; None where it cannot."""
    if rows == mask.numel():
        return mask.flatten().bool()
    if rows == len(mask):
        return torch.ones(rows, dtype=torch.bool)
    if rows % len(mask) == 0 and rows > mask.numel() and not hasattr(root.config, "_diffusers_version"):
        # Sequences are filled up to whole windows.
        return nn.functional.pad(mask, (0, rows // len(mask) - mask.shape[1])).flatten().bool()
    for module in root.modules():
        if rows % len(mask) == 0 and hasattr(module, "_get_feature_vector_attention_mask"):
            # SEW makes one token of two frames.
            squeeze = getattr(root.config, "squeeze_factor", 1)
            shrunk: Tensor = module._get_feature_vector_attention_mask(rows // len(mask) * squeeze + squeeze - 1, mask)
            shrunk = nn.functional.max_pool1d(shrunk.float(), squeeze)
        elif hasattr(module, "_get_output_attention_mask"):
            shrunk = module._get_output_attention_mask(mask)
        elif type(module).__name__ == "WhisperEncoder":
            lengths = module._get_feat_extract_output_lengths(mask.sum(1))
            shrunk = torch.arange(rows // len(mask))[None] < lengths[:, None]
        else:
            continue
        if shrunk.numel() == rows:
            return shrunk.flatten().bool()
    return None


def _rows_that_stay(
    root: nn.Module, inputs: Mapping[str, Any], site: GateSite, z: Tensor, name: str, mask: Tensor | None
) -> Tensor:
    """Which rows stay as they are when other values stand where ``mask`` is 0, or everywhere where it is None."""
    again = torch.cat(look(root, {**inputs, name: _replaced(inputs[name], mask)}, site).pre_activations)
    # Other tokens may go to other experts, so that rows come in another order.
    distance = (z[:, None] - again[None]).abs().amax(dim=-1).amin(dim=1)
    return distance <= SAME * z.abs().max()


def _replaced(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        # What stands for an image stays.
        special = (values < WORDS[0]) | (values >= WORDS[1])
        mask = torch.zeros_like(values) if values.is_floating_point() else special
    # Codebooks are further sequences under one mask, or stand beside the words.
    mask = mask.repeat_interleave(len(values) // len(mask), dim=0)
    if not values.is_floating_point():
        mask = mask[..., None] if mask.ndim < values.ndim else mask
        return torch.where(mask == 0, (values + 7) % 50 + 4, values)
    other = torch.randn(values.shape, generator=torch.Generator().manual_seed(4))
    if mask.ndim < values.ndim:
        mask = mask[:, None] if values.shape[:2] != mask.shape else mask.view(*mask.shape, *[1] * (values.ndim - 2))
    return torch.where(mask == 0, other, values)


def _rows_behind_loss(root: nn.Module, inputs: Mapping[str, Any], site: GateSite) -> Tensor | None:
    """Which rows the loss depends on."""
    seen: list[Tensor] = []
    handle = site.source.watch(seen.append)
    try:
        with evaluating(root):
            loss = loss_of(root(**inputs))
    finally:
        handle.remove()
    if not all(z.requires_grad for z in seen):
        return None
    slopes = torch.autograd.grad(loss, seen, allow_unused=True, materialize_grads=True)
    return torch.cat([(slope != 0).reshape(-1, slope.shape[-1]).any(1) for slope in slopes])
