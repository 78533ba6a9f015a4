"""Scalars by layer and by activation that tell what LoRA does to a model's gates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from na_lora_lightning.core.observation.misalignment import share_of_selection
from na_lora_lightning.core.sites import GateMap


def sites_by_activation(gates: GateMap) -> dict[str, list[int]]:
    """Indices of the sites of each activation, by its name in alphabetical order."""
    members: dict[str, list[int]] = {}
    for index, site in enumerate(gates.sites):
        members.setdefault(site.activation.name, []).append(index)
    return dict(sorted(members.items()))


def by_layer_and_activation(gates: GateMap, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names each site's value by its layer, and adds the channel-weighted mean over the sites of an activation.

    Args:
        gates: Whose sites these are.
        metrics: ``[sites]`` for each group of curves.

    Returns:
        Scalar tensors by tag, such as ``gate_responsiveness/layer_03`` and ``gate_responsiveness/silu``.
    """
    tagged: dict[str, Tensor] = {}
    for group, values in metrics.items():
        for label, value in zip(gates.labels, values, strict=True):
            tagged[f"{group}/{label}"] = value
        for activation, members in sites_by_activation(gates).items():
            sites = [gates.sites[index] for index in members]
            channels = torch.tensor([float(site.channels * site.networks) for site in sites], device=values.device)
            tagged[f"{group}/{activation}"] = (values[members] * channels).sum() / channels.sum()
    return tagged


def misalignment_metrics(gates: GateMap, moved: Tensor, squared_norms: Tensor) -> dict[str, Tensor]:
    """Selection misalignment and its share, by layer and activation.

    Args:
        gates: Whose sites these are.
        moved: Mean |Δρ|, ``[sites]``; NaN where it was not measured.
        squared_norms: ``[2, sites]``, as :class:`~na_lora_lightning.core.observation.misalignment.MisalignmentMeter`
            measures them.

    Returns:
        Scalar tensors by tag; without the sites that were not measured.
    """
    shares = share_of_selection(squared_norms)
    measured = ~moved.isnan()
    tagged: dict[str, Tensor] = {}
    for label, seen, change, share in zip(gates.labels, measured.tolist(), moved, shares, strict=True):
        if seen:
            tagged |= {f"selection_misalignment/{label}": change, f"selection_share/{label}": share}
    for activation, members in sites_by_activation(gates).items():
        members = [index for index in members if measured[index]]
        if members:
            sites = [gates.sites[index] for index in members]
            channels = torch.tensor([float(site.channels) for site in sites], device=moved.device)
            tagged[f"selection_misalignment/{activation}"] = (moved[members] * channels).sum() / channels.sum()
            # Norms add in squares, so the share of an activation is not the mean of its sites' shares.
            tagged[f"selection_share/{activation}"] = share_of_selection(squared_norms[:, members].sum(dim=1))
    return tagged


def as_floats(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """The values of scalar tensors of one device, with one device synchronisation."""
    if not metrics:
        return {}
    values = torch.stack([value.float() for value in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))
