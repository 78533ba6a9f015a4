"""Mechanism one: temporal importance of gate channels, and the mask on their LoRA updates.

Per gate channel i and optimizer step t, over the real tokens of the step::

    r_i(t) = mean |criterion(z_i)|                          responsiveness
    s_i(t) = β·s_i(t−1) + (1−β)·r_i(t), bias-corrected      temporal importance
    m_i    = 1 for the top k·d_ff channels of a site by s_i, else 0

The abstract of arXiv 2606.31717 names a derivative-based temporal-importance mask; the formulas and every option
here are this project's reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

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

Criterion = Literal["selection_derivative", "output_derivative", "homogeneity_gap", "output_derivative_change"]
Scope = Literal["site", "global"]
Selection = Literal["top_k", "threshold", "soft"]
Control = Literal["none", "random", "reversed"]
# Options on which a mask does not depend at the moment when it is made.
_NOT_OF_THE_MASK = frozenset({"beta", "refresh_every", "mask_gradient_to_a"})


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
            experiments: a gain that a control has too is no gain of the method.
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
        criterion: ``"selection_derivative"`` |ρ'|, ``"output_derivative"`` |φ'|, ``"homogeneity_gap"`` |E−1|, or
            ``"output_derivative_change"``, the change of mean |φ'| from one step to the next.
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


def kept_count(keep_fraction: float, channels: int) -> int:
    """Channels kept of ``channels``: the nearest whole number, at least one."""
    return max(1, math.floor(keep_fraction * channels + 0.5))


def top_k_mask(scores: Tensor, count: int) -> Tensor:
    """1 for the ``count`` largest of ``scores`` ``[channels]`` and 0 elsewhere; equal scores by lower index first."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return torch.zeros_like(scores).index_fill_(0, order[:count], 1.0)


def row_weights(scores: Tensor, options: ImportanceOptions, keep_fraction: float, seed: int) -> Tensor:
    """Weights of the LoRA rows of one scope.

    Args:
        scores: Temporal importance s, ``[channels]``.
        options: Which selection and control.
        keep_fraction: k at this step.
        seed: Seed of the random control at this refresh.

    Returns:
        ``[channels]`` float32.
    """
    if options.control == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(scores.numel(), generator=generator).to(scores.device)
    if options.selection == "top_k":
        ranked = -scores if options.control == "reversed" else scores
        return top_k_mask(ranked, kept_count(keep_fraction, scores.numel()))
    mean = scores.mean()
    if options.selection == "threshold":
        kept = (scores >= options.threshold * mean).to(scores.dtype)
        return 1.0 - kept if options.control == "reversed" else kept
    relative = torch.where(mean > 0, scores.clamp(min=0.0) / mean, torch.ones_like(scores))
    if options.control == "reversed":
        relative = relative.max() + relative.min() - relative
    return relative / relative.mean()


class TemporalImportance:
    """Keeps the temporal importance of all gate channels and the weights that follow from it.

    Args:
        options: Options.
        layout: Flat layout of the channels over the sites.

    Attributes:
        steps: Optimizer steps seen.
        responsiveness: r of the last step, ``[channels of all sites]``.
        weights: m, ``[channels of all sites]``; ones during the warm-up.
        changed: 1 for channels whose weight changed between zero and non-zero at the last refresh, shaped alike.
    """

    _STATE = ("_average", "_average_weight", "_previous", "_seen", "responsiveness", "weights", "changed")

    def __init__(self, options: ImportanceOptions, layout: Layout) -> None:
        self.options = options
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

    @property
    def scope_sizes(self) -> tuple[int, ...]:
        """Channels of each scope that is ranked by itself."""
        return tuple(scope.stop - scope.start for scope in self._scopes)

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
    def _scopes(self) -> tuple[slice, ...]:
        return self.layout.slices if self.options.scope == "site" else (slice(0, self.layout.total),)

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
        valid_columns = self.layout.spread(valid)
        mean = statistics.sums[0] / self.layout.spread(statistics.tokens.clamp(min=1.0))
        self.responsiveness = torch.where(valid_columns, mean, self.responsiveness)
        value, usable = mean, valid
        if self.options.criterion == "output_derivative_change":
            value = (mean - self._previous) if self.options.signed else (mean - self._previous).abs()
            usable = valid & self._seen
            self._previous = torch.where(valid_columns, mean, self._previous)
            self._seen |= valid
        beta = self.options.beta
        self._average = moving_average(self._average, value, self.layout.spread(usable), beta)
        ones = torch.ones_like(self._average_weight)
        self._average_weight = moving_average(self._average_weight, ones, usable, beta)
        if self.options.refreshes_at(self.steps):
            self._refresh()

    def _refresh(self) -> None:
        keep_fraction = self.options.keep_fraction_at(self.steps)
        scores = self.importance
        new = torch.empty_like(self.weights)
        for index, scope in enumerate(self._scopes):
            # Far apart, so that no two refreshes and scopes share a random mask.
            seed = self.options.seed * 1_000_003 + self.steps * 10_007 + index
            new[scope] = row_weights(scores[scope], self.options, keep_fraction, seed)
        # A network that has seen no token has no ranking: its rows stay as vanilla LoRA trains them.
        unseen = self.layout.spread(self._average_weight) == 0
        new = torch.where(unseen, torch.ones_like(new), new)
        self.changed = ((new > 0) != (self.weights > 0)).float()
        self.weights = new
        self._acted |= (new != 1.0).any()

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
            ConfigurationError: The state belongs to a model with other gates, or is an average of something else.
        """
        saved = saved_options(state, "criterion", "signed")
        changes = changed_options(saved, self.options)
        require_same_average("importance", changes, "criterion", "signed")
        count = state["weights"].numel()
        if count != self.layout.total or state["average_weight"].numel() != len(self.layout.sizes):
            raise ConfigurationError(
                f"the checkpoint holds the importance of {count} gate channels and the model has {self.layout.total}; "
                "resume with the model and LoRA targets of the checkpoint."
            )
        self.steps = int(state["steps"])
        for name in self._STATE:
            setattr(self, name, state[name.lstrip("_")].to(getattr(self, name)))
        if changes.keys() - _NOT_OF_THE_MASK:
            # The mask in force was made by the former options, and would stay until the next refresh.
            if self.is_active:
                self._refresh()
            else:
                self.weights = torch.ones_like(self.weights)
        self._acted = (self.weights != 1.0).any()
        return changes
