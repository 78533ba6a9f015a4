"""Mechanism two: an activation-specific scale of the LoRA step, from a coarse partition by effective homogeneity.

A pre-activation is *suppressed* (E < 0), *homogeneous* (|E−1| ≤ τ) or *transitional* (otherwise). With p_R the
share of the observed mass in regime R, an exponential moving average over optimizer steps, and g_R the mean of
|E−1| within R::

    η = Σ_R p_R · c_R,      c_R = 1 / (1 + g_R), clipped to [η_min, 1]

Mass is counted by |φ|, so that silent tokens do not dominate, in p_R and in g_R alike. Where the partition is not
meaningful (E constant on the support of φ, or fewer than two regimes with 5 % of the mass at the site), η = 1.
Each of several stacked experts counts as a site of its own here.

η is for B, whose rows are the channels. The step of A moves the selection of all channels of a layer at once and has a
factor of its own.

The abstract of arXiv 2606.31717 names an activation-specific step-scaling rule for a meaningful coarse
effective-homogeneity partition; the formulas are this project's reconstruction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from na_lora_lightning.core.activations import ActivationValues
from na_lora_lightning.core.channels import Layout
from na_lora_lightning.core.mechanisms.mechanism import Mechanism, mean_per_site, moving_average
from na_lora_lightning.core.mechanisms.saved_options import (
    Changes,
    require_same_average,
)
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions, has_partition
from na_lora_lightning.core.observation.observer import StepStatistics
from na_lora_lightning.core.sites import GateSite
from na_lora_lightning.errors import ConfigurationError

REGIMES = ("suppressed", "transitional", "homogeneous")
_MEANINGFUL_SHARE = 0.05


class RegimeCollector:
    """Sums, per regime, the mass |φ| and the mass times |E−1|.

    Args:
        tau: τ.
        per_channel: One column per channel instead of one per site.
    """

    components = 2 * len(REGIMES)

    def __init__(self, tau: float, per_channel: bool) -> None:
        self._tau = tau
        self._per_channel = per_channel

    def columns(self, site: GateSite) -> int:
        """The site's channels, or one column for all."""
        return site.channels if self._per_channel else 1

    def collect(self, values: ActivationValues, token_weight: Tensor) -> Tensor:
        """``[6, columns]``: mass of the three regimes, then mass·|E−1| of the three."""
        signed_gap, output = values.rounded_gap, values.output
        gap = signed_gap.abs()
        by_regime = torch.empty(len(REGIMES), *output.shape, dtype=output.dtype, device=output.device)
        suppressed, transitional, homogeneous = by_regime
        mass = torch.abs(output, out=transitional)
        # Indicators as numbers: products are several times faster than a choice by booleans on a CPU.
        torch.lt(signed_gap, -1.0, out=suppressed).mul_(mass)
        torch.le(gap, self._tau, out=homogeneous).mul_(mass)
        # By element, where it is exact; a difference of sums would cancel where suppressed tokens hold nearly all mass.
        mass.sub_(suppressed).sub_(homogeneous)
        if self._per_channel:
            sums = torch.cat([token_weight @ by_regime, token_weight @ by_regime.mul_(gap)])
        else:
            over_channels = [by_regime.sum(dim=-1, keepdim=True), by_regime.mul_(gap).sum(dim=-1, keepdim=True)]
            sums = token_weight @ torch.cat(over_channels)
        return sums.reshape(self.components, -1)


def scale_of_shares(shares: Tensor, gap_shares: Tensor, eta_min: float) -> Tensor:
    """η from regime shares.

    Args:
        shares: p_R, ``[3, groups]``, non-negative, summing to one over regimes.
        gap_shares: p_R·g_R, ``[3, groups]``.
        eta_min: Lowest c_R.

    Returns:
        η, ``[groups]``, in [eta_min, 1].
    """
    held = shares.clamp(min=1e-12)
    # 1 / (1 + g_R), which is exactly 1 where g_R is 0.
    factor = (held / (held + gap_shares)).clamp(min=eta_min, max=1.0)
    # Written as a reduction from 1, so that factors of exactly 1 give exactly 1.
    return 1.0 - (shares * (1.0 - factor)).sum(dim=0)


def _as_shares(average: Tensor) -> Tensor:
    """Bias-corrected averages: the regimes' shares, in the first three rows of ``[3 or 6, groups]``, sum to one.

    A group that was not seen in the first steps, such as an expert, has weighed less than the steps since.
    """
    # What is not zero is no smaller than a share times 1 - β, which is far above the least number.
    return average / average[: len(REGIMES)].sum(dim=0).clamp(min=torch.finfo(average.dtype).tiny)


def is_meaningful(shares: Tensor) -> Tensor:
    """Whether at least two regimes hold 5 % of the mass; ``[3, groups]`` to ``[groups]``, boolean."""
    return (shares >= _MEANINGFUL_SHARE).sum(dim=0) >= 2


class StepScale(Mechanism):
    """Keeps regime shares and the step scale that follows from them.

    Args:
        options: Options.
        sites: Gate sites.
        layout: Layout of the collector's columns (networks, or channels for granularity ``"channel"``).

    Attributes:
        steps: Optimizer steps seen.
        scale: η per column of the layout.
    """

    name = "step_scale"
    title = "step scale"
    _STATE = ("_group_average", "_network_average", "_weight", "scale")

    def __init__(self, options: StepScaleOptions, sites: Sequence[GateSite], layout: Layout) -> None:
        self.options: StepScaleOptions = options
        self.layout = layout
        self.steps = 0
        self.factor_of_a = options.matrix_a_factor
        device = layout.network_of_column.device
        self.activations = sorted({site.activation.name for site in sites})
        of_network = [site for site in sites for _ in range(site.networks)]
        self._activation_of_network = torch.tensor(
            [self.activations.index(site.activation.name) for site in of_network], device=device
        )
        self._network_in_activation = one_hot(self._activation_of_network, len(self.activations)).float()
        self._channels = torch.tensor([float(site.channels) for site in of_network], device=device)
        self._partitioned = torch.tensor([has_partition(site) for site in of_network], device=device)
        self._groups = len(self.activations) if options.granularity == "activation" else layout.total
        # Of the groups that have a scale each, and behind them of the networks.
        self._averages = torch.zeros(2 * len(REGIMES), self._groups + len(of_network), device=device)
        self._weight = torch.zeros((), device=device)
        self.scale = torch.ones(layout.total, device=device)
        self._acted = torch.zeros((), dtype=torch.bool, device=device)
        self._one = torch.ones((), device=device)

    @classmethod
    def collector(cls, options: StepScaleOptions) -> RegimeCollector:
        """See :class:`~na_lora_lightning.core.mechanisms.mechanism.Mechanism`."""
        return RegimeCollector(options.tau, options.granularity == "channel")

    @property
    def has_acted(self) -> bool:
        """Whether the partition was meaningful anywhere in a step of this training; synchronises."""
        return bool(self._acted)

    @property
    def seen(self) -> Tensor:
        """Which networks had any mass in a step, ``[networks]``, boolean."""
        return self._network_average.sum(dim=0) > 0

    @property
    def is_active(self) -> bool:
        """Whether a scale is in force, so that an update must be changed."""
        return self.steps > 0

    @property
    def network_shares(self) -> Tensor:
        """p_R of each network, ``[3, networks]``."""
        return _as_shares(self._network_average)

    @property
    def _group_average(self) -> Tensor:
        return self._averages[:, : self._groups]

    @_group_average.setter
    def _group_average(self, value: Tensor) -> None:
        self._averages[:, : self._groups] = value

    @property
    def _network_average(self) -> Tensor:
        return self._averages[: len(REGIMES), self._groups :]

    @_network_average.setter
    def _network_average(self, value: Tensor) -> None:
        self._averages[: len(REGIMES), self._groups :] = value

    def update(self, statistics: StepStatistics) -> None:
        """Takes in one optimizer step and sets the scale."""
        self.steps += 1
        per_network = self.layout.over_networks(statistics.sums, lambda columns: columns.sum(dim=-1))
        by_activation = self.options.granularity == "activation"
        grouped = per_network @ self._network_in_activation if by_activation else statistics.sums
        self._take_in(torch.cat([grouped, per_network], dim=1))
        self._weight = moving_average(self._weight, self._one, None, self.options.beta)
        self.scale = self._scale()

    def row_weights(self, channels: Layout) -> Tensor:
        """η; see :class:`~na_lora_lightning.core.mechanisms.mechanism.Mechanism`."""
        return self.scale if self.scale.numel() == channels.total else channels.spread(self.scale)

    def metrics(self) -> dict[str, Tensor]:
        """Occupancy of each regime, the step scale, and its deviation where channels have their own."""
        shares = _mean_over_networks(self.network_shares, self.layout)
        metrics = {f"gate_regime_{name}": share for name, share in zip(REGIMES, shares, strict=True)}
        metrics["gate_step_scale"] = mean_per_site(self.scale, self.layout)
        if self.options.granularity == "channel":
            # Their mean alone says nothing where it is normalised to 1.
            metrics["gate_step_scale_deviation"] = self.layout.over_sites(
                self.scale, lambda columns: columns.std(dim=-1, correction=0)
            )
        return metrics

    def _take_in(self, sums: Tensor) -> None:
        """Moves the averages towards the shares of this step; a column without mass keeps its shares."""
        mass = sums[: len(REGIMES)].sum(dim=0)
        kept = self._averages / self._weight.clamp(min=1e-12)
        shares = torch.where(mass > 0, sums / mass, kept)
        self._averages = moving_average(self._averages, shares, None, self.options.beta)

    def _scale(self) -> Tensor:
        shares, of_networks = _as_shares(self._averages).tensor_split([self._groups], dim=1)
        per_group = scale_of_shares(shares[: len(REGIMES)], shares[len(REGIMES) :], self.options.eta_min)
        if self.options.granularity == "activation":
            per_group = per_group[self._activation_of_network]
        scaled_networks = self._partitioned.logical_and(is_meaningful(of_networks[: len(REGIMES)]))
        self._acted.logical_or_(scaled_networks.any())
        scaled = self.layout.spread(scaled_networks)
        if self.options.normalize:
            per_group = self._normalized(per_group, scaled)
        return torch.where(scaled, per_group, self._one)

    def _normalized(self, scale: Tensor, scaled: Tensor) -> Tensor:
        """Divides by the mean over the enclosing span, columns of unscaled networks left out."""
        if self.options.granularity == "channel":
            means = self.layout.over_networks(scale, lambda columns: columns.mean(dim=-1))
            return scale / self.layout.spread(means).clamp(min=1e-12)
        if self.options.granularity == "activation":
            members = torch.ones_like(scale)[:, None]
        else:
            members = self._network_in_activation
        # A column stands for all channels of its network.
        amount = self._channels * scaled
        mean = ((scale * amount) @ members) / (amount @ members).clamp(min=1e-12)
        return scale / (members @ mean).clamp(min=1e-12)

    def _require_fitting(self, state: Mapping[str, Any], changes: Changes) -> None:
        require_same_average("step scale", changes, "granularity", "tau")
        if state["scale"].shape != self.scale.shape or state["group_average"].shape != self._group_average.shape:
            raise ConfigurationError(
                f"the checkpoint holds {state['scale'].numel()} step scales and this run has {self.scale.numel()}; "
                "resume with the model, LoRA targets and granularity of the checkpoint."
            )

    def _adopt(self, changes: Changes) -> None:
        if changes and self.is_active:
            self.scale = self._scale()
        self._acted = (self.scale != 1.0).any()


def _mean_over_networks(shares: Tensor, layout: Layout) -> Tensor:
    """Regime shares ``[3, networks]`` to ``[3, sites]``; experts that saw no token are left out."""
    if shares.shape[1] == len(layout.site_networks):
        return shares
    seen = shares.sum(dim=0).clamp(max=1.0)
    sites = [shares[:, own].sum(dim=1) / seen[own].sum().clamp(min=1e-12) for own in layout.site_networks]
    return torch.stack(sites, dim=1)
