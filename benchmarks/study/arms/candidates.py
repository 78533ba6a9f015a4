"""Candidates for a better rule, as hooks: what screening is to judge before any of it becomes an option of the package.

All of them weigh the rows of an optimizer's step and keep its Frobenius norm (unless told not to), so that a gain is
none of longer or shorter steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from benchmarks.study import StudyError
from benchmarks.study.arms.hooks import ArmHook, BuiltArm, lora_matrices
from na_lora_lightning.core.lora_layers import is_lora_layer, lora_a, lora_b

if TYPE_CHECKING:
    from na_lora_lightning.core.activations import ActivationValues
    from na_lora_lightning.core.sites import GateSite

_LARGEST = 4.0


class Target(NamedTuple):
    """A LoRA matrix with a row or column for each gate channel.

    Attributes:
        parameter: ``lora_B`` of the gate or up layer (channels are rows), or ``lora_A`` of the down layer (columns).
        rows: Its rows of channels, ``[channels]``; None where channels are columns.
        site: Index of the site.
    """

    parameter: Tensor
    rows: Tensor | None
    site: int

    def by_channel(self, values: Tensor) -> Tensor:
        """``values``, shaped like the parameter, as ``[channels, ...]``."""
        return values.T if self.rows is None else values[self.rows]


class RowRule(ArmHook):
    """Base: multiplies the step of each channel by a weight.

    Args:
        built: The arm.
        layers: Of ``"gate"``, ``"up"`` and ``"down"``, those whose step is weighed.
        keep_norm: Rescale the weights so that the step of each matrix keeps its norm.

    Raises:
        StudyError: A layer is unknown, or the gates are of stacked experts.
    """

    def __init__(self, built: BuiltArm, layers: Sequence[str] = ("gate",), keep_norm: bool = True) -> None:
        super().__init__(built)
        unknown = set(layers) - {"gate", "up", "down"}
        if unknown or any(site.networks > 1 for site in built.gates):
            raise StudyError("a rule weighs the layers 'gate', 'up' and 'down' of blocks without experts.")
        self._keep_norm = keep_norm
        self.targets = [
            target for index, site in enumerate(built.gates) for target in self._targets_of(index, site, layers)
        ]
        self._before: list[Tensor] = []

    def _targets_of(self, index: int, site: GateSite, layers: Sequence[str]) -> list[Target]:
        found = []
        if "gate" in layers:
            found.append(Target(lora_b(site.lora_layer, "default").weight, site.rows, index))
        up_name = site.lora_layer_name.replace("gate_proj", "up_proj")
        if "up" in layers and up_name != site.lora_layer_name:
            up = self.built.model.get_base_model().get_submodule(up_name)
            found.append(Target(lora_b(up, "default").weight, site.rows, index))
        if "down" in layers and site.output_layer is not None and is_lora_layer(site.output_layer):
            found.append(Target(lora_a(site.output_layer, "default").weight, None, index))
        return found

    def weights(self, target: Target, step: int, moved: Tensor) -> Tensor | None:
        """The weight of each channel, ``[channels]``, or None to leave the step as it is."""
        raise NotImplementedError

    def before_step(self, step: int) -> None:
        """Copies what the step will change."""
        self._before = [target.parameter.detach().clone() for target in self.targets]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Weighs the step."""
        for target, before in zip(self.targets, self._before, strict=True):
            moved = target.by_channel(target.parameter - before)
            weights = self.weights(target, step, moved)
            if weights is None:
                continue
            weighed = weights[:, None] * moved
            if self._keep_norm:
                weighed *= moved.norm() / weighed.norm().clamp(min=1e-30)
            if target.rows is None:
                target.parameter.copy_(before + weighed.T)
            else:
                target.parameter.index_copy_(0, target.rows, before[target.rows] + weighed)


class GradientSignal(RowRule):
    """Adam walks a channel with a small gradient as far as one with a large: give back some of the difference.

    The weight is (g_i / mean g)^power with g_i the root mean square of Adam's second moment over the channel's row.
    With power 1 Adam normalises a matrix as a whole and no longer its channels one by one.
    """

    def __init__(self, built: BuiltArm, power: float = 0.5, layers: Sequence[str] = ("gate",)) -> None:
        super().__init__(built, layers)
        self._power = power

    def weights(self, target: Target, step: int, moved: Tensor) -> Tensor | None:
        """See the class."""
        second = target.by_channel(self.built.optimizer.state[target.parameter]["exp_avg_sq"])
        signal = second.mean(dim=1).sqrt()
        return (signal / signal.mean().clamp(min=1e-30)).pow(self._power).clamp(max=_LARGEST)


class ResponsivePower(RowRule):
    """The weight is (r_i / mean r)^power, with the temporal importance r of the arm's ``importance`` options.

    The arm's ``importance`` should keep everything (``keep_fraction: 1.0``), so that it only measures.
    """

    def __init__(self, built: BuiltArm, power: float = 0.5, layers: Sequence[str] = ("gate",)) -> None:
        super().__init__(built, layers)
        if built.controller is None or built.controller.importance is None:
            raise StudyError("the rule needs importance with keep_fraction 1.0, which measures responsiveness.")
        self._power = power

    def _importance(self, target: Target) -> Tensor:
        assert self.built.controller is not None
        importance = self.built.controller.importance
        assert importance is not None
        return importance.importance[self.built.controller.layout.site_slices[target.site]]

    def weights(self, target: Target, step: int, moved: Tensor) -> Tensor | None:
        """See the class."""
        own = self._importance(target)
        return (own / own.mean().clamp(min=1e-30)).pow(self._power).clamp(max=_LARGEST)


class SelectionTrustRegion(ResponsivePower):
    """Caps how far the step moves each channel's selection.

    To first order a step moves ρ of channel i by r_i·|ΔB_i·Ax|. A channel for which r_i·‖ΔB_i‖ exceeds ``budget`` times
    the mean of its site is shortened to it; the norm of the whole step is kept.
    """

    def __init__(self, built: BuiltArm, budget: float = 1.0, keep_norm: bool = True) -> None:
        super().__init__(built)
        self._budget, self._keep_norm = budget, keep_norm

    def weights(self, target: Target, step: int, moved: Tensor) -> Tensor | None:
        """See the class."""
        predicted = self._importance(target) * moved.norm(dim=1)
        return (self._budget * predicted.mean() / predicted.clamp(min=1e-30)).clamp(max=1.0)


class MaskOfUpLayer(RowRule):
    """The arm's mask also holds the rows of the up layer that feed the same channels."""

    def __init__(self, built: BuiltArm) -> None:
        super().__init__(built, layers=("up",), keep_norm=False)
        if built.controller is None:
            raise StudyError("the rule copies the weights of a mechanism; give the arm importance or step_scale.")

    def weights(self, target: Target, step: int, moved: Tensor) -> Tensor | None:
        """See the class."""
        assert self.built.controller is not None
        return self.built.controller.weights[self.built.controller.layout.site_slices[target.site]]


class ActivityCollector:
    """Sums |φ'(z)|·|φ(z)| over tokens, per channel: responsive and also in use."""

    components = 1

    def columns(self, site: GateSite) -> int:
        """One column per gate channel."""
        return site.channels

    def collect(self, values: ActivationValues, token_weight: Tensor) -> Tensor:
        """The sum, ``[1, channels]``."""
        return (token_weight @ (values.output_derivative * values.output).abs()).reshape(1, -1)


class ActivityWeighted(ArmHook):
    """The arm's temporal importance is the mean of |φ'|·|φ| instead of its own criterion."""

    def __init__(self, built: BuiltArm) -> None:
        super().__init__(built)
        if built.controller is None or built.controller.importance is None:
            raise StudyError("the rule replaces the criterion of a mask; give the arm importance.")
        built.controller.observer.add("importance", ActivityCollector())


class TimeWindow(RowRule):
    """Multiplies the step of whole layers by a factor in a part of the run: gates late, gates early, or always.

    Args:
        built: The arm.
        factor: The factor inside of the window.
        start: First step of it.
        end: Step after its last; None stands for the end of the run.
        layers: Which layers.
    """

    def __init__(
        self,
        built: BuiltArm,
        factor: float,
        start: int = 0,
        end: int | None = None,
        layers: Sequence[str] = ("gate",),
    ) -> None:
        super().__init__(built, layers, keep_norm=False)
        self._inside: Callable[[int], bool] = lambda step: step >= start and (end is None or step < end)
        self._factor = factor

    def weights(self, target: Target, step: int, moved: Tensor) -> Tensor | None:
        """See the class."""
        return torch.full((len(moved),), self._factor) if self._inside(step) else None


def slow_down(built: BuiltArm, factor: float, layers: str) -> None:
    """Gives the matrices A of some layers a group of their own in the optimizer, with a smaller learning rate.

    Args:
        built: The arm.
        factor: On the learning rate; 0 leaves them as they were drawn.
        layers: See :func:`~benchmarks.study.arms.hooks.lora_matrices`.
    """
    slow = lora_matrices(built, layers, ("lora_A",))
    chosen = {id(parameter) for parameter in slow}
    for group in built.optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
    built.optimizer.add_param_group({"params": slow, "lr": factor * built.optimizer.param_groups[0]["lr"]})


class SlowA(ArmHook):
    """A smaller learning rate for the matrices A of gate layers, of all other layers, or of all.

    A step of A moves the selection of every channel at once, whichever channels asked for it; a step of B moves each
    channel by its own gradient.

    Args:
        built: The arm.
        factor: On the learning rate.
        layers: See :func:`~benchmarks.study.arms.hooks.lora_matrices`.
    """

    def __init__(self, built: BuiltArm, factor: float, layers: str = "gate") -> None:
        super().__init__(built)
        slow_down(built, factor, layers)


class TrustRegionAndSlowA(SelectionTrustRegion):
    """:class:`SelectionTrustRegion` on B and :class:`SlowA` on A, both of the gates."""

    def __init__(self, built: BuiltArm, factor: float, budget: float = 1.0) -> None:
        super().__init__(built, budget)
        slow_down(built, factor, "gate")
