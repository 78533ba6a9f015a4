"""Options of the temporal-importance mask."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from na_lora_lightning.core.lora_layers import is_on_parameter, is_product_of_modules
from na_lora_lightning.core.sharding import is_sharded
from na_lora_lightning.core.sites import GateSite
from na_lora_lightning.errors import ConfigurationError

Criterion = Literal["selection_derivative", "output_derivative", "homogeneity_gap", "output_derivative_change"]
Scope = Literal["site", "global"]
Selection = Literal["top_k", "threshold", "soft"]
Control = Literal["none", "random", "reversed"]


@dataclass(frozen=True)
class ImportanceVariant:
    """The rarer choices of the temporal-importance mask; each is an ablation or a control.

    Attributes:
        signed: Average the criterion with its sign instead of its magnitude.
        selection: ``"top_k"`` keeps the fraction of most important channels, ``"threshold"`` those of at least
            ``threshold`` times the mean importance, ``"soft"`` weights each channel by its importance over the
            mean (weights of mean 1).
        threshold: Multiple of the mean importance for ``selection="threshold"``, positive.
        keep_fraction_start: Keep fraction at the end of the warm-up, from which it moves in a straight line to
            ``keep_fraction``; None for a constant one.
        keep_fraction_steps: Optimizer steps that this takes.
        mask_gradient_to_a: Also mask the gradient that reaches ``lora_A`` through the masked rows, so that the
            shared rank directions are learned from the kept channels alone.
        control: ``"random"`` keeps as many channels at random, ``"reversed"`` the least important ones. For
            experiments: a gain that a control has too is not a gain of the method.
        seed: Seed of the random control.
    """

    signed: bool = False
    selection: Selection = "top_k"
    threshold: float = 0.5
    keep_fraction_start: float | None = None
    keep_fraction_steps: int = 0
    mask_gradient_to_a: bool = False
    control: Control = "none"
    seed: int = 0


@dataclass(frozen=True)
class ImportanceOptions(ImportanceVariant):
    """All options of the temporal-importance mask.

    The defaults follow from ``docs/evidence.md``, section "Defaults": to keep half of the channels by |ρ'|, the plain
    reading of the method, costs test loss, and to keep all but the least responsive tenth by |φ'| does not (table
    "second round").

    Attributes:
        keep_fraction: k, the fraction of gate channels whose rows are updated, in (0, 1].
        beta: β of the exponential moving average, in [0, 1).
        criterion: What responsiveness is the mean of: ``"output_derivative"`` |φ'|, the slope of the activation;
            ``"selection_derivative"`` |ρ'|, the slope of its selection weight ρ(z) = φ(z)/z; ``"homogeneity_gap"``
            |E−1|, with the effective homogeneity E(z) = z·φ'(z)/φ(z); or ``"output_derivative_change"``, the change
            of mean |φ'| from one step to the next.
        scope: Rank and average ``"site"`` by site (each expert by itself), or over all sites together
            (``"global"``).
        warmup_steps: Optimizer steps before the first mask; all rows are updated until then.
        refresh_every: Optimizer steps between two masks, at least 1.
    """

    keep_fraction: float = 0.9
    beta: float = 0.9
    criterion: Criterion = "output_derivative"
    scope: Scope = "site"
    warmup_steps: int = 10
    refresh_every: int = 10

    def __post_init__(self) -> None:
        for name in ("keep_fraction", "keep_fraction_start"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1.0:
                raise ConfigurationError(
                    f"{name} is {value}, and it is the fraction of gate channels to update; give a number above 0 and "
                    "at most 1 (1 updates all of them, as plain LoRA does)."
                )
        if not 0.0 <= self.beta < 1.0:
            raise ConfigurationError(
                f"beta is {self.beta}, and a moving average needs a number from 0 (no memory) to below 1; 0.9 is usual."
            )
        if self.threshold <= 0.0:
            raise ConfigurationError(
                f"threshold is {self.threshold}, and it multiplies the mean importance; give a positive number."
            )
        for name, lowest in (("warmup_steps", 0), ("refresh_every", 1), ("keep_fraction_steps", 0)):
            if getattr(self, name) < lowest:
                raise ConfigurationError(
                    f"{name} is {getattr(self, name)}, and it counts optimizer steps; give at least {lowest}."
                )
        for name, allowed in (
            ("criterion", Criterion),
            ("scope", Scope),
            ("selection", Selection),
            ("control", Control),
        ):
            if getattr(self, name) not in get_args(allowed):
                raise ConfigurationError(
                    f"{name} is {getattr(self, name)!r}, which does not exist; choose one of "
                    f"{', '.join(get_args(allowed))}."
                )
        if self.keep_fraction_start is not None and self.keep_fraction_steps == 0:
            raise ConfigurationError(
                "keep_fraction_start is set and keep_fraction_steps is 0, so the schedule takes no time; give the "
                "number of optimizer steps from the one keep fraction to the other."
            )

    def keep_fraction_at(self, step: int) -> float:
        """Keep fraction at optimizer step ``step`` (counted from 1)."""
        if self.keep_fraction_start is None:
            return self.keep_fraction
        progress = min(1.0, max(0, step - self.warmup_steps - 1) / self.keep_fraction_steps)
        return self.keep_fraction_start + progress * (self.keep_fraction - self.keep_fraction_start)

    def refreshes_at(self, step: int) -> bool:
        """Whether a new mask is taken at optimizer step ``step`` (counted from 1)."""
        return step > self.warmup_steps and (step - self.warmup_steps - 1) % self.refresh_every == 0

    @property
    def is_neutral(self) -> bool:
        """Whether every row keeps its update by what is asked for, and not by how numbers round."""
        return self.selection == "top_k" and self.keep_fraction == 1.0 and self.keep_fraction_start in (None, 1.0)

    def first_mask(self, sizes: Iterable[int]) -> int | None:
        """Optimizer step (counted from 1) of the first mask that can hold or weight a row.

        Args:
            sizes: Channels of each scope that is ranked.

        Returns:
            The step; None where every mask of the schedule keeps all rows.
        """
        step = self.warmup_steps + 1
        if self.selection != "top_k":
            return step
        constant_from = step + (0 if self.keep_fraction_start is None else self.keep_fraction_steps)
        while not any(kept_count(self.keep_fraction_at(step), size) < size for size in sizes):
            if step >= constant_from:
                return None
            step += self.refresh_every
        return step

    def check(self, sites: Sequence[GateSite]) -> None:
        """Checks that these options work for every site.

        Raises:
            ConfigurationError: The criterion cannot rank the channels of an activation, or the gradient of an A cannot
                be masked.
        """
        self.check_activations(sites)
        if self.mask_gradient_to_a:
            for site in sites:
                _require_maskable_gradient(site)

    def check_activations(self, sites: Sequence[GateSite]) -> None:
        """Checks that the criterion ranks the channels of every site.

        Raises:
            ConfigurationError: It is zero everywhere for an activation (|ρ'| and |E−1| for ReLU).
        """
        for site in sites:
            activation = site.activation
            if self.criterion == "selection_derivative" and activation.has_constant_selection:
                reason = "its selection weight has no slope"
            elif self.criterion == "selection_derivative" and not activation.self_gated:
                reason = "it is not self-gated and has no selection weight"
            elif self.criterion == "homogeneity_gap" and activation.has_constant_selection:
                reason = "its homogeneity is 1 everywhere"
            else:
                continue
            raise ConfigurationError(
                f"the criterion {self.criterion!r} cannot rank the channels of {site.name!r}, whose activation is "
                f"{activation.name}: {reason}; use criterion='output_derivative'."
            )


def _require_maskable_gradient(site: GateSite) -> None:
    if is_on_parameter(site.lora_layer):
        raise ConfigurationError(
            f"mask_gradient_to_a does not work for {site.name!r}, whose LoRA is on a parameter, so that the gradient "
            "of A cannot be told from that of B; set it to False."
        )
    if not all(is_product_of_modules(site.lora_layer, adapter) for adapter in site.adapters):
        raise ConfigurationError(
            f"mask_gradient_to_a does not work for {site.name!r}, whose adapter is not the product of two layers "
            "(AdaLoRA, or a variant of LoRA other than DoRA); set it to False."
        )
    sharded = [entry.name for entry in site.parameters() if is_sharded(entry.parameter)]
    if sharded:
        raise ConfigurationError(
            f"mask_gradient_to_a does not work for {sharded[0]!r}, which is sharded, so that no process has the whole "
            "gradient of A; set it to False, or use strategy='ddp'."
        )


def kept_count(keep_fraction: float, channels: int) -> int:
    """Channels kept of ``channels``: the nearest whole number, at least one."""
    return max(1, math.floor(keep_fraction * channels + 0.5))
