"""Turns the state of the mechanisms into scalars by layer and by activation, and writes them to the loggers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.importance import TemporalImportance
from na_lora_lightning.core.misalignment import share_of_selection
from na_lora_lightning.core.statistics import Layout
from na_lora_lightning.core.step_scale import REGIMES, StepScale


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
    """Occupancy of each regime and the step scale, each ``[sites]``."""
    shares = _mean_over_networks(step_scale.network_shares, step_scale.layout)
    metrics = {f"gate_regime_{name}": share for name, share in zip(REGIMES, shares, strict=True)}
    metrics["gate_step_scale"] = mean_per_site(step_scale.scale, step_scale.layout)
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


def write(trainer: Trainer, metrics: Mapping[str, Tensor], step: int) -> None:
    """Writes scalars to every logger of the trainer, with one device synchronisation."""
    if not metrics or not trainer.loggers:
        return
    values = torch.stack([value.float() for value in metrics.values()]).tolist()
    named = dict(zip(metrics, values, strict=True))
    for logger in trainer.loggers:
        logger.log_metrics(named, step=step)


def write_histograms(trainer: Trainer, importance: TemporalImportance, labels: list[str], step: int) -> None:
    """Writes the responsiveness of each site's channels as a histogram to TensorBoard loggers."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            for label, columns in zip(labels, importance.layout.site_slices, strict=True):
                values = importance.responsiveness[columns].cpu()
                logger.experiment.add_histogram(f"gate_responsiveness_of_channels/{label}", values, step)
