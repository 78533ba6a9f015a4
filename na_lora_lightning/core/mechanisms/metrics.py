"""Scalars by layer and by activation that tell what LoRA does to a model's gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from na_lora_lightning.core.layout import Layout
from na_lora_lightning.core.mechanisms.importance import TemporalImportance
from na_lora_lightning.core.mechanisms.step_scale import REGIMES, StepScale
from na_lora_lightning.core.observation.misalignment import share_of_selection

if TYPE_CHECKING:
    from na_lora_lightning.core.controller import GateController


def mean_per_site(values: Tensor, layout: Layout) -> Tensor:
    """Means over each site's columns, ``[columns]`` to ``[sites]``."""
    if layout.total == len(layout.site_slices):
        return values
    return torch.stack([values[columns].mean() for columns in layout.site_slices])


def importance_metrics(importance: TemporalImportance) -> dict[str, Tensor]:
    """Responsiveness, mask density and mask churn, each ``[sites]``."""
    layout = importance.layout
    return {
        "gate_responsiveness": mean_per_site(importance.responsiveness, layout),
        "gate_mask_density": mean_per_site((importance.weights > 0).float(), layout),
        "gate_mask_churn": mean_per_site(importance.changed, layout),
    }


def step_scale_metrics(step_scale: StepScale) -> dict[str, Tensor]:
    """Occupancy of each regime, the step scale, and its deviation where channels have their own; each ``[sites]``."""
    shares = _mean_over_networks(step_scale.network_shares, step_scale.layout)
    metrics = {f"gate_regime_{name}": share for name, share in zip(REGIMES, shares, strict=True)}
    scale, layout = step_scale.scale, step_scale.layout
    metrics["gate_step_scale"] = mean_per_site(scale, layout)
    if step_scale.options.granularity == "channel":
        # Their mean alone says nothing where it is normalised to 1.
        deviations = [scale[columns].std(correction=0) for columns in layout.site_slices]
        metrics["gate_step_scale_deviation"] = torch.stack(deviations)
    return metrics


def _mean_over_networks(shares: Tensor, layout: Layout) -> Tensor:
    """Regime shares ``[3, networks]`` to ``[3, sites]``; experts that saw no token are left out."""
    if shares.shape[1] == len(layout.site_networks):
        return shares
    seen = shares.sum(dim=0).clamp(max=1.0)
    sites = [shares[:, own].sum(dim=1) / seen[own].sum().clamp(min=1e-12) for own in layout.site_networks]
    return torch.stack(sites, dim=1)


def sites_by_activation(controller: GateController) -> dict[str, list[int]]:
    """Indices of the sites of each activation, by its name in alphabetical order."""
    members: dict[str, list[int]] = {}
    for index, site in enumerate(controller.gates.sites):
        members.setdefault(site.activation.name, []).append(index)
    return dict(sorted(members.items()))


def by_layer_and_activation(controller: GateController, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names each site's value by its layer, and adds the channel-weighted mean over the sites of an activation.

    Args:
        controller: Whose sites these are.
        metrics: ``[sites]`` for each group of curves.

    Returns:
        Scalar tensors by tag, such as ``gate_responsiveness/layer_03`` and ``gate_responsiveness/silu``.
    """
    tagged: dict[str, Tensor] = {}
    for group, values in metrics.items():
        for label, value in zip(controller.gates.labels, values, strict=True):
            tagged[f"{group}/{label}"] = value
        for activation, members in sites_by_activation(controller).items():
            sites = [controller.gates.sites[index] for index in members]
            channels = torch.tensor([float(site.channels * site.networks) for site in sites], device=values.device)
            tagged[f"{group}/{activation}"] = (values[members] * channels).sum() / channels.sum()
    return tagged


def misalignment_metrics(controller: GateController) -> dict[str, Tensor]:
    """Selection misalignment and its share by layer and activation; empty where the step was not measured."""
    if controller.misalignment is None:
        return {}
    moved, squared_norms = controller.misalignment
    shares = share_of_selection(squared_norms)
    measured = ~moved.isnan()
    tagged: dict[str, Tensor] = {}
    for label, seen, change, share in zip(controller.gates.labels, measured.tolist(), moved, shares, strict=True):
        if seen:
            tagged |= {f"selection_misalignment/{label}": change, f"selection_share/{label}": share}
    for activation, members in sites_by_activation(controller).items():
        members = [index for index in members if measured[index]]
        if members:
            sites = [controller.gates.sites[index] for index in members]
            channels = torch.tensor([float(site.channels) for site in sites], device=moved.device)
            tagged[f"selection_misalignment/{activation}"] = (moved[members] * channels).sum() / channels.sum()
            # Norms add in squares, so the share of an activation is not the mean of its sites' shares.
            tagged[f"selection_share/{activation}"] = share_of_selection(squared_norms[:, members].sum(dim=1))
    return tagged


def gate_metrics(controller: GateController) -> dict[str, Tensor]:
    """All scalars that the mechanisms of a controller and the last step's measurement have, by tag."""
    metrics: dict[str, Tensor] = {}
    if controller.importance is not None:
        metrics |= importance_metrics(controller.importance)
    scale = controller.step_scale or controller.watched_scale
    if scale is not None:
        metrics |= step_scale_metrics(scale)
    return by_layer_and_activation(controller, metrics) | misalignment_metrics(controller)


def as_floats(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """The values of scalar tensors of one device, with one device synchronisation."""
    if not metrics:
        return {}
    values = torch.stack([value.float() for value in metrics.values()]).tolist()
    return dict(zip(metrics, values, strict=True))
