"""Mechanism one: temporal importance of gate channels, and the mask on their LoRA updates.

Per gate channel i and optimizer step t, over the real tokens of the step::

    r_i(t) = mean |criterion(z_i)|                          responsiveness
    s_i(t) = β·s_i(t−1) + (1−β)·r_i(t), bias-corrected      temporal importance
    m_i    = 1 for the top k·d_ff channels of a site by s_i, else 0

The abstract of arXiv 2606.31717 names a derivative-based temporal-importance mask; the formulas and every option
here are this project's reconstruction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from na_lora_lightning.core.activations import ActivationValues
from na_lora_lightning.core.channels import Layout, runs
from na_lora_lightning.core.mechanisms.importance_options import Criterion, ImportanceOptions, kept_count
from na_lora_lightning.core.mechanisms.mechanism import Mechanism, mean_per_site, moving_average
from na_lora_lightning.core.mechanisms.saved_options import (
    Changes,
    require_same_average,
)
from na_lora_lightning.core.observation.observer import StepStatistics
from na_lora_lightning.core.sites import GateSite
from na_lora_lightning.core.stepping.gradient_mask import GradientMask
from na_lora_lightning.errors import ConfigurationError

# Options on which a mask does not depend at the moment when it is made.
_NOT_OF_THE_MASK = frozenset({"beta", "refresh_every", "mask_gradient_to_a"})


class ResponsivenessCollector:
    """Sums the criterion over tokens, per channel."""

    components = 1

    def __init__(self, criterion: Criterion, signed: bool) -> None:
        self._criterion = criterion
        self._signed = signed

    def columns(self, site: GateSite) -> int:
        """One column per gate channel."""
        return site.channels

    def collect(self, values: ActivationValues, token_weight: Tensor) -> Tensor:
        """Σ_tokens of the criterion, ``[1, networks·channels]``."""
        if self._criterion == "selection_derivative":
            each = values.selection_derivative
        elif self._criterion == "homogeneity_gap":
            each = values.homogeneity_gap
        else:
            each = values.output_derivative
        return (token_weight @ (each if self._signed else each.abs())).reshape(1, -1)


def top_k_mask(scores: Tensor, count: int) -> Tensor:
    """1 for the ``count`` largest of ``scores`` ``[..., channels]``, 0 elsewhere; equal scores by lower index first."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(scores).scatter_(-1, order[..., :count], 1.0)


def row_weights(scores: Tensor, options: ImportanceOptions, keep_fraction: float, seed: int) -> Tensor:
    """Weights of the LoRA rows of scopes of one size, each ranked by itself.

    Args:
        scores: Temporal importance s, ``[..., channels]``.
        options: Which selection and control.
        keep_fraction: k at this step.
        seed: Seed of the random control at this refresh for the first scope; those after it count on.

    Returns:
        Float32, shaped like ``scores``.
    """
    if options.control == "random":
        seeds = range(seed, seed + scores[..., 0].numel())
        drawn = [torch.rand(scores.shape[-1], generator=torch.Generator().manual_seed(each)) for each in seeds]
        scores = torch.stack(drawn).view_as(scores).to(scores.device)
    if options.selection == "top_k":
        ranked = -scores if options.control == "reversed" else scores
        return top_k_mask(ranked, kept_count(keep_fraction, scores.shape[-1]))
    mean = scores.mean(dim=-1, keepdim=True)
    if options.selection == "threshold":
        kept = (scores >= options.threshold * mean).to(scores.dtype)
        return 1.0 - kept if options.control == "reversed" else kept
    relative = torch.where(mean > 0, scores.clamp(min=0.0) / mean, torch.ones_like(scores))
    if options.control == "reversed":
        relative = relative.amax(dim=-1, keepdim=True) + relative.amin(dim=-1, keepdim=True) - relative
    return relative / relative.mean(dim=-1, keepdim=True)


class TemporalImportance(Mechanism):
    """Keeps the temporal importance of all gate channels and the weights that follow from it.

    Args:
        options: Options.
        layout: Flat layout of the channels over the sites.
        sites: Gate sites, on whose gradients the mask acts too where it is asked for.

    Attributes:
        steps: Optimizer steps seen.
        responsiveness: r of the last step, ``[channels of all sites]``.
        weights: m, ``[channels of all sites]``; ones during the warm-up.
        changed: 1 for channels whose weight changed between zero and non-zero at the last refresh, shaped alike.
    """

    name = "importance"
    title = "temporal-importance mask"
    _SAVED_ALONE = ("criterion", "signed")
    _STATE = ("_average", "_average_weight", "_previous", "_seen", "responsiveness", "weights", "changed")

    def __init__(self, options: ImportanceOptions, layout: Layout, sites: Sequence[GateSite] = ()) -> None:
        self.options: ImportanceOptions = options
        self.layout = layout
        device = layout.network_of_column.device
        self.steps = 0
        self._average = torch.zeros(layout.total, device=device)
        self._average_weight = torch.zeros(len(layout.sizes), device=device)
        self._previous = torch.zeros(layout.total, device=device)
        self._seen = torch.zeros(len(layout.sizes), dtype=torch.bool, device=device)
        self.responsiveness = torch.zeros(layout.total, device=device)
        self.weights = torch.ones(layout.total, device=device)
        self.changed = torch.zeros(layout.total, device=device)
        self._acted = torch.zeros((), dtype=torch.bool, device=device)
        self._one = torch.ones((), device=device)
        self._gradient_mask = GradientMask(sites, layout) if options.mask_gradient_to_a and sites else None

    @classmethod
    def collector(cls, options: ImportanceOptions) -> ResponsivenessCollector:
        """See :class:`~na_lora_lightning.core.mechanisms.mechanism.Mechanism`."""
        return ResponsivenessCollector(options.criterion, options.signed)

    @property
    def scope_sizes(self) -> tuple[int, ...]:
        """Channels of each scope that is ranked by itself."""
        return self.layout.sizes if self.options.scope == "site" else (self.layout.total,)

    def first_mask(self) -> int | None:
        """Optimizer step (counted from 1) of the first mask that can hold or weight a row; None for never."""
        return self.options.first_mask(set(self.scope_sizes))

    def held_count(self, keep_fraction: float) -> int:
        """Number of rows that a top-k mask holds."""
        return sum(size - kept_count(keep_fraction, size) for size in self.scope_sizes)

    @property
    def has_acted(self) -> bool:
        """Whether a mask has held or weighted a row; synchronises where that depends on the scores."""
        first = self.first_mask()
        if first is None or self.steps < first:
            return False
        return self.options.selection != "threshold" or bool(self._acted)

    @property
    def seen(self) -> Tensor:
        """Which networks have a temporal importance, ``[networks]``, boolean."""
        return self._average_weight > 0

    @property
    def is_active(self) -> bool:
        """Whether a mask is in force, so that an update must be changed."""
        return self.steps > self.options.warmup_steps

    @property
    def importance(self) -> Tensor:
        """Bias-corrected s, ``[channels of all sites]``; zero where nothing was seen yet."""
        weight = self.layout.spread(self._average_weight)
        return torch.where(weight > 0, self._average / weight.clamp(min=1e-12), torch.zeros_like(weight))

    def update(self, statistics: StepStatistics) -> None:
        """Takes in one optimizer step and refreshes the mask when it is due."""
        self.steps += 1
        valid = statistics.tokens > 0
        tokens = self.layout.spread(statistics.tokens)
        valid_columns = tokens > 0
        mean = statistics.sums[0] / tokens
        self.responsiveness = torch.where(valid_columns, mean, self.responsiveness)
        value, usable, usable_columns = mean, valid, valid_columns
        if self.options.criterion == "output_derivative_change":
            value = (mean - self._previous) if self.options.signed else (mean - self._previous).abs()
            usable = valid & self._seen
            usable_columns = self.layout.spread(usable)
            self._previous = torch.where(valid_columns, mean, self._previous)
            self._seen |= valid
        beta = self.options.beta
        self._average = moving_average(self._average, value, usable_columns, beta)
        self._average_weight = moving_average(self._average_weight, self._one, usable, beta)
        if self.options.refreshes_at(self.steps):
            self._refresh()
        self._share_mask()

    def row_weights(self, channels: Layout) -> Tensor:
        """m; see :class:`~na_lora_lightning.core.mechanisms.mechanism.Mechanism`."""
        return self.weights

    def metrics(self) -> dict[str, Tensor]:
        """Responsiveness, mask density and mask churn, each ``[sites]``."""
        return {
            "gate_responsiveness": mean_per_site(self.responsiveness, self.layout),
            "gate_mask_density": mean_per_site((self.weights > 0).float(), self.layout),
            "gate_mask_churn": mean_per_site(self.changed, self.layout),
        }

    def attach(self) -> None:
        """Hooks the gradients of A, where they are masked."""
        if self._gradient_mask is not None:
            self._gradient_mask.attach()
            self._share_mask()

    def detach(self) -> None:
        """Takes the hooks off."""
        if self._gradient_mask is not None:
            self._gradient_mask.detach()

    def _share_mask(self) -> None:
        if self._gradient_mask is not None:
            self._gradient_mask.weights = self.weights if self.is_active else None

    def _refresh(self) -> None:
        keep_fraction = self.options.keep_fraction_at(self.steps)
        scores = self.importance
        # Far apart, so that no two refreshes and scopes share a random mask.
        seed = self.options.seed * 1_000_003 + self.steps * 10_007
        parts = []
        for scopes, size in runs(self.scope_sizes):
            of_size = scores[scopes].view(-1, size)
            parts.append(row_weights(of_size, self.options, keep_fraction, seed).flatten())
            seed += len(of_size)
        new = torch.cat(parts)
        # A network that has seen no token has no ranking: its rows stay as vanilla LoRA trains them.
        unseen = self.layout.spread(self._average_weight) == 0
        new = torch.where(unseen, torch.ones_like(new), new)
        self.changed = ((new > 0) != (self.weights > 0)).float()
        self.weights = new
        self._acted |= (new != 1.0).any()

    def _require_fitting(self, state: Mapping[str, Any], changes: Changes) -> None:
        require_same_average("importance", changes, *self._SAVED_ALONE)
        count = state["weights"].numel()
        if count != self.layout.total or state["average_weight"].numel() != len(self.layout.sizes):
            raise ConfigurationError(
                f"the checkpoint holds the importance of {count} gate channels and the model has {self.layout.total}; "
                "resume with the model and LoRA targets of the checkpoint."
            )

    def _adopt(self, changes: Changes) -> None:
        if changes.keys() - _NOT_OF_THE_MASK:
            # The mask in force was made by the former options, and would stay until the next refresh.
            if self.is_active:
                self._refresh()
            else:
                self.weights = torch.ones_like(self.weights)
        self._acted = (self.weights != 1.0).any()
        self._share_mask()
