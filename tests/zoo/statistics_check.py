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

from na_lora_lightning.core.activations import ActivationValues
from na_lora_lightning.core.observation.observer import GateObserver, ObserverOptions
from na_lora_lightning.core.sites import GateSite
from zoo.tiny_models import loss_of
from zoo.watching import evaluating, look, rows_of_experts

SAME = 1e-4


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
        mask = inputs.get("attention_mask") if mixes_padding else None
        real = _real_rows(root, inputs, site, z) if mask is None else mask.flatten().bool()
        if real is None:
            untold += 1
            continue
        own = [torch.ones_like(real)] if site.experts is None else rows_of_experts(root, inputs, site, seen)
        problem = _compare(site, count, sums.view(site.networks, -1), z, real, own)
        problems += [] if problem is None else [problem]
    if untold:
        notes.append(f"statistics of {untold} sites not compared, because replaced padding shows in no token or in all")
    return problems


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


def _real_rows(root: Any, inputs: Mapping[str, Any], site: GateSite, z: Tensor) -> Tensor | None:
    """Which rows belong to real tokens, ``[rows]``; None where that cannot be told."""
    mask = inputs.get("attention_mask")
    padded = mask is not None and not bool(mask.all()) and "input_ids" in inputs
    real = _rows_without_padding(root, inputs, site, z) if padded else torch.ones(len(z), dtype=torch.bool)
    if root.config.is_encoder_decoder and "labels" in inputs and bool((inputs["labels"] < 0).any()):
        # What is padded in a decoder has no label, and what fills up an encoder's windows is seen by no decoder.
        behind = _rows_behind_loss(root, inputs, site)
        return None if behind is None else real & behind
    return None if padded and (bool(real.all()) or not bool(real.any())) else real


def _rows_without_padding(root: nn.Module, inputs: Mapping[str, Any], site: GateSite, z: Tensor) -> Tensor:
    """Which rows stay as they are when other tokens stand in padded places."""
    # Codebooks are further sequences under one mask.
    mask = inputs["attention_mask"].repeat_interleave(len(inputs["input_ids"]) // len(inputs["attention_mask"]), dim=0)
    tokens = torch.where(mask == 0, (inputs["input_ids"] + 7) % 50 + 4, inputs["input_ids"])
    again = torch.cat(look(root, {**inputs, "input_ids": tokens}, site).pre_activations)
    # Other tokens may go to other experts, so that rows come in another order.
    distance = (z[:, None] - again[None]).abs().amax(dim=-1).amin(dim=1)
    return distance <= SAME * z.abs().max()


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
