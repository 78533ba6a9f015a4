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

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from na_lora_lightning.core.activations import ActivationValues
from na_lora_lightning.core.layout import Layout
from na_lora_lightning.core.mechanisms.mechanism import moving_average
from na_lora_lightning.core.mechanisms.saved_options import (
    Changes,
    changed_options,
    require_same_average,
    saved_options,
)
from na_lora_lightning.core.observation.observer import StepStatistics
from na_lora_lightning.core.sites import GateSite
from na_lora_lightning.errors import ConfigurationError

REGIMES = ("suppressed", "transitional", "homogeneous")
_MEANINGFUL_SHARE = 0.05

Granularity = Literal["activation", "site", "channel"]


@dataclass(frozen=True)
class StepScaleOptions:
    """Options of the step scale.

    The defaults follow from ``docs/evidence.md``, section "Defaults": one scale per activation that is not normalised
    is a plain cut of the step, which a tuned learning rate undoes (table "options"). A ``matrix_a_factor`` of 0.25
    nearly halves the selection misalignment; on two of three screening tasks it cost nothing, in confirmation it did
    (tables "second round" and "confirmation").

    Attributes:
        granularity: One scale per ``"activation"``, per ``"site"`` or per gate ``"channel"``.
        tau: τ, half-width of the homogeneous regime |E−1| ≤ τ, in (0, 1), with the effective homogeneity
            E(z) = z·φ'(z)/φ(z) of the activation φ.
        eta_min: Lowest factor of a regime, in (0, 1]; the step scale is the mean of these factors by share.
        normalize: Divide the scales by their mean over what encloses them (all gate channels of the model for
            activations, the sites of one activation for sites, the channels of one site for channels), so that
            steps are redistributed and not made smaller.
        beta: β of the moving average of the regime shares, in [0, 1).
        matrix_a_factor: Factor on the step of ``lora_A`` of the gate layers, in [0, 1]. A step of B moves each channel
            by its own gradient; a step of A moves the selection of all of them at once. 1 leaves A as the optimizer
            moves it, 0 leaves it as it was drawn. Where gate and up are one layer, they share A.
    """

    granularity: Granularity = "channel"
    tau: float = 0.1
    eta_min: float = 0.1
    normalize: bool = True
    beta: float = 0.9
    matrix_a_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.granularity not in get_args(Granularity):
            raise ConfigurationError(
                f"granularity is {self.granularity!r}, which does not exist; choose one of "
                f"{', '.join(get_args(Granularity))}."
            )
        if not 0.0 < self.tau < 1.0:
            raise ConfigurationError(
                f"tau is {self.tau}, and it is the half-width of the homogeneous regime around E = 1; give a number "
                "between 0 and 1, such as 0.1."
            )
        if not 0.0 < self.eta_min <= 1.0:
            raise ConfigurationError(
                f"eta_min is {self.eta_min}, and it is the smallest step scale; give a number above 0 and at most 1."
            )
        if not 0.0 <= self.beta < 1.0:
            raise ConfigurationError(
                f"beta is {self.beta}, and a moving average needs a number from 0 (no memory) to below 1; 0.9 is usual."
            )

        if not 0.0 <= self.matrix_a_factor <= 1.0:
            raise ConfigurationError(
                f"matrix_a_factor is {self.matrix_a_factor}, and it is the part of the step of lora_A that is taken; "
                "give a number from 0 to 1 (1 takes all of it)."
            )

    def check_activations(self, sites: Sequence[GateSite]) -> None:
        """Checks that the scale can differ from 1 anywhere, or that there is a step of A to shorten.

        Raises:
            ConfigurationError: It is exactly 1 by construction, so that training would be vanilla LoRA.
        """
        if self.matrix_a_factor != 1.0 and any(site.matrices_a() for site in sites):
            return
        names = {site.activation.name for site in sites if has_partition(site)}
        if not names:
            raise ConfigurationError(
                f"the step scale is exactly 1 for {', '.join(sorted({s.activation.name for s in sites}))}, whose "
                "effective homogeneity has no meaningful partition; leave StepScaleCallback out (--step_scale false)."
            )
        if self.normalize and self.granularity == "activation" and len(names) == 1:
            raise ConfigurationError(
                f"normalize with granularity 'activation' makes the step scale exactly 1, because {names.pop()} is the "
                "only activation; use granularity 'site' or 'channel', or normalize=False."
            )

    @property
    def is_neutral(self) -> bool:
        """Whether every step stays what it is by what is asked for."""
        return self.eta_min == 1.0 and self.matrix_a_factor == 1.0

    def cancels_out(self, sites: Sequence[GateSite]) -> bool:
        """Whether normalisation by site makes every scale 1, because each activation has one gate alone."""
        networks = Counter(site.activation.name for site in sites if has_partition(site) for _ in range(site.networks))
        return self.normalize and self.granularity == "site" and max(networks.values(), default=1) == 1


def has_partition(site: GateSite) -> bool:
    """Whether the site's activation is self-gated with an E that varies on its support."""
    return site.activation.self_gated and not site.activation.has_constant_homogeneity


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
        signed_gap = values.homogeneity_gap
        gap = signed_gap.abs()
        mass = values.output.abs()
        # Indicators as numbers: products are several times faster than a choice by booleans on a CPU.
        suppressed = torch.lt(signed_gap, -1.0, out=torch.empty_like(mass))
        homogeneous = torch.le(gap, self._tau, out=torch.empty_like(mass))
        in_suppressed, in_homogeneous = suppressed * mass, homogeneous * mass
        # By element, where it is exact; a difference of sums would cancel where suppressed tokens hold nearly all mass.
        by_regime = (in_suppressed, mass - in_suppressed - in_homogeneous, in_homogeneous)
        amounts = (*by_regime, *(own * gap for own in by_regime))
        return torch.stack([self._sum(amount, token_weight) for amount in amounts])

    def _sum(self, amount: Tensor, token_weight: Tensor) -> Tensor:
        per_channel = token_weight @ amount
        return per_channel.flatten() if self._per_channel else per_channel.sum(dim=1)


def scale_of_shares(shares: Tensor, gap_shares: Tensor, eta_min: float) -> Tensor:
    """η from regime shares.

    Args:
        shares: p_R, ``[3, groups]``, non-negative, summing to one over regimes.
        gap_shares: p_R·g_R, ``[3, groups]``.
        eta_min: Lowest c_R.

    Returns:
        η, ``[groups]``, in [eta_min, 1].
    """
    mean_gap = gap_shares / shares.clamp(min=1e-12)
    factor = (1.0 / (1.0 + mean_gap)).clamp(min=eta_min, max=1.0)
    # Written as a reduction from 1, so that factors of exactly 1 give exactly 1.
    return 1.0 - (shares * (1.0 - factor)).sum(dim=0)


def _as_shares(average: Tensor) -> Tensor:
    """Bias-corrected averages: the regimes' shares, in the first three rows of ``[3 or 6, groups]``, sum to one.

    A group that was not seen in the first steps, such as an expert, has weighed less than the steps since.
    """
    total = average[: len(REGIMES)].sum(dim=0)
    return average / torch.where(total > 0, total, 1.0)


def is_meaningful(shares: Tensor) -> Tensor:
    """Whether at least two regimes hold 5 % of the mass; ``[3, groups]`` to ``[groups]``, boolean."""
    return (shares >= _MEANINGFUL_SHARE).sum(dim=0) >= 2


class StepScale:
    """Keeps regime shares and the step scale that follows from them.

    Args:
        options: Options.
        sites: Gate sites.
        layout: Layout of the collector's columns (networks, or channels for granularity ``"channel"``).

    Attributes:
        steps: Optimizer steps seen.
        scale: η per column of the layout.
    """

    _STATE = ("_group_average", "_network_average", "_weight", "scale")

    def __init__(self, options: StepScaleOptions, sites: Sequence[GateSite], layout: Layout) -> None:
        self.options = options
        self.layout = layout
        self.steps = 0
        device = layout.network_of_column.device
        self.activations = sorted({site.activation.name for site in sites})
        of_network = [site for site in sites for _ in range(site.networks)]
        self._activation_of_network = torch.tensor(
            [self.activations.index(site.activation.name) for site in of_network], device=device
        )
        self._network_in_activation = one_hot(self._activation_of_network, len(self.activations)).float()
        self._channels = torch.tensor([float(site.channels) for site in of_network], device=device)
        self._partitioned = torch.tensor([has_partition(site) for site in of_network], device=device)
        groups = len(self.activations) if options.granularity == "activation" else layout.total
        self._group_average = torch.zeros(2 * len(REGIMES), groups, device=device)
        self._network_average = torch.zeros(len(REGIMES), len(of_network), device=device)
        self._weight = torch.zeros((), device=device)
        self.scale = torch.ones(layout.total, device=device)
        self._acted = torch.zeros((), dtype=torch.bool, device=device)

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

    def update(self, statistics: StepStatistics) -> None:
        """Takes in one optimizer step and sets the scale."""
        self.steps += 1
        per_network = self._sum_columns(statistics.sums)
        grouped = self._group(statistics.sums, per_network)
        self._group_average = self._average(self._group_average, grouped)
        self._network_average = self._average(self._network_average, per_network[: len(REGIMES)])
        one = torch.ones_like(self._weight)
        self._weight = moving_average(self._weight, one, one.bool(), self.options.beta)
        self.scale = self._scale()

    def _average(self, average: Tensor, sums: Tensor) -> Tensor:
        """Moves the average towards the shares of this step; a column without mass keeps its shares."""
        mass = sums[: len(REGIMES)].sum(dim=0)
        seen = mass > 0
        kept = average / self._weight.clamp(min=1e-12)
        shares = torch.where(seen, sums / torch.where(seen, mass, 1.0), kept)
        return moving_average(average, shares, torch.ones_like(average, dtype=torch.bool), self.options.beta)

    def _sum_columns(self, sums: Tensor) -> Tensor:
        """``[6, columns]`` to ``[6, networks]``."""
        if self.layout.total == len(self.layout.sizes):
            return sums
        return torch.stack([sums[:, columns].sum(dim=1) for columns in self.layout.slices], dim=1)

    def _group(self, sums: Tensor, per_network: Tensor) -> Tensor:
        if self.options.granularity != "activation":
            return sums
        return per_network @ self._network_in_activation

    def _scale(self) -> Tensor:
        shares = _as_shares(self._group_average)
        per_group = scale_of_shares(shares[: len(REGIMES)], shares[len(REGIMES) :], self.options.eta_min)
        if self.options.granularity == "activation":
            per_group = per_group[self._activation_of_network]
        scaled_networks = self._partitioned & is_meaningful(self.network_shares)
        self._acted |= scaled_networks.any()
        scaled = self.layout.spread(scaled_networks)
        if self.options.normalize:
            per_group = self._normalized(per_group, scaled)
        return torch.where(scaled, per_group, torch.ones_like(per_group))

    def _normalized(self, scale: Tensor, scaled: Tensor) -> Tensor:
        """Divides by the mean over the enclosing span, columns of unscaled networks left out."""
        if self.options.granularity == "channel":
            means = torch.stack([scale[columns].mean() for columns in self.layout.slices])
            return scale / self.layout.spread(means).clamp(min=1e-12)
        if self.options.granularity == "activation":
            members = torch.ones_like(scale)[:, None]
        else:
            members = self._network_in_activation
        # A column stands for all channels of its network.
        amount = self._channels * scaled
        mean = ((scale * amount) @ members) / (amount @ members).clamp(min=1e-12)
        return scale / (members @ mean).clamp(min=1e-12)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that restore this object exactly."""
        return {
            "steps": self.steps,
            "options": asdict(self.options),
            **{name.lstrip("_"): getattr(self, name).clone() for name in self._STATE},
        }

    def load_state_dict(self, state: dict[str, Any]) -> Changes:
        """Restores what :meth:`state_dict` returned; the options are those of this object, from the next step on.

        Returns:
            Options that differ from those of the state.

        Raises:
            ConfigurationError: The state belongs to other gates, another granularity or other regimes.
        """
        changes = changed_options(saved_options(state), self.options)
        require_same_average("step scale", changes, "granularity", "tau")
        if state["scale"].shape != self.scale.shape or state["group_average"].shape != self._group_average.shape:
            raise ConfigurationError(
                f"the checkpoint holds {state['scale'].numel()} step scales and this run has {self.scale.numel()}; "
                "resume with the model, LoRA targets and granularity of the checkpoint."
            )
        self.steps = int(state["steps"])
        for name in self._STATE:
            setattr(self, name, state[name.lstrip("_")].to(getattr(self, name)))
        if changes and self.is_active:
            self.scale = self._scale()
        self._acted = (self.scale != 1.0).any()
        return changes
