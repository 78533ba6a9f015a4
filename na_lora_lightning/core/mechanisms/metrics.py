"""What LoRA does to a model's gates, in numbers: by site, as curves by layer, and as a few curves over all layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from na_lora_lightning.core.observation.misalignment import share_of_selection
from na_lora_lightning.core.sites import GateMap
from na_lora_lightning.curves import overview_tag

if TYPE_CHECKING:
    from na_lora_lightning.core.mechanisms.mechanism_set import MechanismSet

MISALIGNMENT, SHARE = "selection_misalignment", "selection_share"
# Norms of the feature and of the selection term, squared.
_NORMS = ("feature", "selection")


def sites_by_activation(gates: GateMap) -> dict[str, list[int]]:
    """Indices of the sites of each activation, by its name in alphabetical order."""
    members: dict[str, list[int]] = {}
    for index, site in enumerate(gates.sites):
        members.setdefault(site.activation.name, []).append(index)
    return dict(sorted(members.items()))


@dataclass(frozen=True)
class GateMetrics:
    """Numbers of one step, taken from the device.

    Attributes:
        gates: Whose they are.
        sites: A value for each site, by group; NaN for a site that was not measured.
        squared_norms: Of what the adapter changes, ``[2][sites]``; empty where that was not measured.
        constant: Groups that are left out of the curves by layer.
        constant_over_layers: Those that are left out of the curves over all layers.
    """

    gates: GateMap
    sites: Mapping[str, Sequence[float]]
    squared_norms: Sequence[Sequence[float]]
    constant: frozenset[str]
    constant_over_layers: frozenset[str]

    def overview(self) -> dict[str, float]:
        """Each group over all layers, ``gates/responsiveness``; by activation (``…/silu``) where there are several.

        Means are weighted by channels. Squared norms are added, so that a share is not the mean of the sites' shares.
        """
        curves: dict[str, float] = {}
        of_activations = sites_by_activation(self.gates)
        for group, values in self.sites.items():
            if group in self.constant_over_layers:
                continue
            for activation, members in of_activations.items():
                seen = [index for index in members if not math.isnan(values[index])]
                if seen:
                    suffix = f"/{activation}" if len(of_activations) > 1 else ""
                    curves[overview_tag(group) + suffix] = (
                        self._share(seen) if group == SHARE else self._mean(values, seen, group)
                    )
        return curves

    def by_layer(self) -> dict[str, float]:
        """Each site's value by tags such as ``gate_responsiveness/layer_03``."""
        return {
            f"{group}/{label}": value
            for group, values in self.sites.items()
            if group not in self.constant
            for label, value in zip(self.gates.labels, values, strict=True)
            if not math.isnan(value)
        }

    def _mean(self, values: Sequence[float], members: Sequence[int], group: str) -> float:
        sites = [self.gates.sites[index] for index in members]
        # A measurement of misalignment is of a site's experts together.
        weights = [site.channels * (1 if group == MISALIGNMENT else site.networks) for site in sites]
        products = (values[index] * weight for index, weight in zip(members, weights, strict=True))
        return math.fsum(products) / sum(weights)

    def _share(self, members: Sequence[int]) -> float:
        feature, selection = (math.sqrt(math.fsum(row[index] for index in members)) for row in self.squared_norms)
        return selection / (feature + selection) if feature + selection > 0 else 0.0


def gate_metrics(gates: GateMap, mechanisms: MechanismSet, misalignment: tuple[Tensor, Tensor] | None) -> GateMetrics:
    """Takes the numbers of the last step from the device, with one synchronisation.

    Args:
        gates: Whose sites these are.
        mechanisms: What is on.
        misalignment: Mean |Δρ| ``[sites]``, NaN where it was not measured, and squared norms ``[2, sites]``; None for
            a step that was not measured.
    """
    groups = mechanisms.metrics()
    if misalignment is not None:
        moved, norms = misalignment
        shares = torch.where(moved.isnan(), moved, share_of_selection(norms))
        groups = groups | {MISALIGNMENT: moved, SHARE: shares, **dict(zip(_NORMS, norms, strict=True))}
    values = torch.stack([value.float() for value in groups.values()]).tolist() if groups else []
    named = dict(zip(groups, values, strict=True))
    squared = [named.pop(name) for name in _NORMS if name in named]
    return GateMetrics(gates, named, squared, *_constant_groups(mechanisms))


def _constant_groups(mechanisms: MechanismSet) -> tuple[frozenset[str], frozenset[str]]:
    """Groups that say nothing, by layer and over all layers: constant whatever the model does, or told by others."""
    # What is left beside the other two regimes.
    everywhere = {"gate_regime_transitional"}
    over_layers: set[str] = set()
    importance, scale = mechanisms.importance, mechanisms.step_scale or mechanisms.watched_scale
    if importance is not None:
        options = importance.options
        if options.selection == "top_k" and options.keep_fraction_start in (None, options.keep_fraction):
            (everywhere if options.scope == "site" else over_layers).add("gate_mask_density")
        if options.is_neutral:
            everywhere |= {"gate_mask_density", "gate_mask_churn"}
    if scale is not None and scale.options.normalize:
        if scale.options.granularity == "channel":
            everywhere.add("gate_step_scale")
        elif scale.options.granularity == "site":
            over_layers.add("gate_step_scale")
    return frozenset(everywhere), frozenset(everywhere | over_layers)
