"""What happens inside a gate during a cell: selection misalignment, and how far the optimizer walks which channels.

A probe is one forward pass of a fixed batch between two optimizer steps, the same batch for every arm, read by the
package's own observer and meter. It leaves no trace in the training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.study.arms.hooks import BuiltArm
from benchmarks.study.tasks.encoding import inputs_of
from na_lora_lightning.core.lora_layers import lora_b
from na_lora_lightning.core.mechanisms.importance import ResponsivenessCollector
from na_lora_lightning.core.mechanisms.importance_options import Criterion
from na_lora_lightning.core.model_entry import root_of
from na_lora_lightning.core.observation.misalignment import MisalignmentMeter, share_of_selection
from na_lora_lightning.core.observation.observer import GateObserver, ObserverOptions
from na_lora_lightning.core.sites import GateSite

CRITERIA: dict[str, Criterion] = {"output": "output_derivative", "selection": "selection_derivative"}
GROUPS = 10


def by_decile(ranking: Tensor, values: Tensor) -> Tensor:
    """Means of ``values`` in ten groups of channels, from least to greatest ``ranking``; both ``[channels]``."""
    ordered = values[torch.argsort(ranking, stable=True)]
    return torch.stack([group.mean() for group in ordered.tensor_split(GROUPS)])


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]


class GateProbe:
    """Probes of one cell.

    Args:
        built: The arm.
        batch: The batch of every probe.
    """

    def __init__(self, built: BuiltArm, batch: dict[str, Tensor]) -> None:
        self._built = built
        self._batch = batch
        self._previous = {site.name: self._rows(site) for site in built.gates}

    def _rows(self, site: GateSite) -> Tensor:
        weights = [lora_b(site.lora_layer, adapter).weight for adapter in site.adapters]
        rows = torch.cat([weight.detach().float() for weight in weights], dim=1)  # type: ignore[operator]
        return rows[site.rows.to(rows.device)].clone()

    def measure(self) -> dict[str, Any]:
        """One probe.

        Returns:
            Per gate site ``misalignment`` (mean |Δρ|) and ``share`` (of the selection term); ``walk``, the mean
            distance that rows of B went since the last probe, by decile of the responsiveness |φ'| (``output``) and
            |ρ'| (``selection``) of their channels, averaged over sites, and ``row_norm``, the mean norm of the rows
            themselves alike. Empty for an arm whose gates have no LoRA that the package reads.
        """
        sites = self._built.gates.sites
        if not sites:
            return {}
        observer = GateObserver(root_of(self._built.model), sites, ObserverOptions(max_tokens=None))
        layouts = {
            name: observer.add(name, ResponsivenessCollector(criterion, signed=False))
            for name, criterion in CRITERIA.items()
        }
        meter = MisalignmentMeter(observer)
        meter.enabled = True
        meter.attach()
        observer.attach()
        self._forward_without_trace()
        statistics = observer.finish_step(None)
        measured = meter.finish_step(None)
        observer.detach()
        meter.detach()
        assert measured is not None
        moved, norms = measured
        rows = {site.name: self._rows(site) for site in sites}
        walk: dict[str, list[Tensor]] = {name: [] for name in CRITERIA}
        norm: dict[str, list[Tensor]] = {name: [] for name in CRITERIA}
        for index, site in enumerate(sites):
            distance = (rows[site.name] - self._previous[site.name]).norm(dim=1)
            for name in CRITERIA:
                responsiveness = statistics[name].sums[0, layouts[name].site_slices[index]]
                walk[name].append(by_decile(responsiveness, distance))
                norm[name].append(by_decile(responsiveness, rows[site.name].norm(dim=1)))
        self._previous = rows
        return {
            "misalignment": _rounded(moved),
            "share": _rounded(share_of_selection(norms)),
            "walk": {name: _rounded(torch.stack(values).mean(dim=0)) for name, values in walk.items()},
            "row_norm": {name: _rounded(torch.stack(values).mean(dim=0)) for name, values in norm.items()},
        }

    def _forward_without_trace(self) -> None:
        """The forward pass; what the arm's own observer saw of it is forgotten."""
        controller = self._built.controller
        passes = 0 if controller is None else controller.observer.forward_passes
        # With gradients, since observers look at training passes alone; nothing is backpropagated.
        with torch.enable_grad():
            self._built.model(**inputs_of(self._batch))
        if controller is not None:
            controller.observer.reset()
            controller.meter.reset()
            controller.observer.forward_passes = passes
