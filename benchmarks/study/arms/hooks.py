"""What an arm does around each optimizer step that no option says: controls, and candidates for a better rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.study import StudyError
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.lora_layers import is_lora_layer, lora_a, lora_b
from na_lora_lightning.core.sites import GateMap


@dataclass
class BuiltArm:
    """A model that is ready to be trained.

    Attributes:
        model: The adapted model, in training mode.
        optimizer: Of its trainable parameters.
        gates: Its gates; empty where none has LoRA that the package can read.
        controller: Of the arm's mechanisms; None without one. It is attached after the hooks are made.
        hooks: Called around each optimizer step.
    """

    model: PeftModel
    optimizer: Optimizer
    gates: GateMap
    controller: GateController | None
    hooks: list[ArmHook]


class ArmHook:
    """Base of all hooks.

    Args:
        built: The arm, with model, optimizer, gates and controller.
    """

    def __init__(self, built: BuiltArm) -> None:
        self.built = built

    def before_step(self, step: int) -> None:
        """Called after the backward pass and clipping, before optimizer step ``step`` (counted from 0)."""

    def after_step(self, step: int) -> None:
        """Called after the optimizer step, when the mechanisms have corrected it, while gradients are still there."""


def lora_matrices(built: BuiltArm, layers: str, kinds: tuple[str, ...]) -> list[Tensor]:
    """The trained matrices of some layers, in the model's order.

    Args:
        built: The arm.
        layers: ``"gate"``, ``"others"`` (all but the gates), ``"all"``, or else a part of the layers' names.
        kinds: Of ``"lora_A"`` and ``"lora_B"``.

    Raises:
        StudyError: There are none.
    """
    of_gates = {id(matrix(site.lora_layer, "default").weight) for site in built.gates for matrix in (lora_a, lora_b)}
    found = []
    for name, parameter in built.model.named_parameters():
        if not parameter.requires_grad or not any(kind in name for kind in kinds):
            continue
        if layers in ("gate", "others"):
            is_chosen = (id(parameter) in of_gates) == (layers == "gate")
        else:
            is_chosen = layers == "all" or layers in name
        if is_chosen:
            found.append(parameter)
    if not found:
        raise StudyError(f"no layer is called {layers!r}, so nothing would change; give a part of a layer's name.")
    return found


class AdaLoraAllocation(ArmHook):
    """AdaLoRA's call of each step, without which it never prunes."""

    def after_step(self, step: int) -> None:
        """Moves ranks between the layers."""
        self.built.model.base_model.update_and_allocate(step)  # type: ignore[operator]


class EqualNorm(ArmHook):
    """Control: plain LoRA whose gate layers take steps of the same norm as the arm's mechanism leaves.

    Each site's step is shortened as much as the mechanism shortens it, and that of all its rows alike. A gain that
    this control has too comes from shorter steps and not from the choice of channels.

    Raises:
        StudyError: The arm has no mechanism, or gates of stacked experts.
    """

    def __init__(self, built: BuiltArm) -> None:
        super().__init__(built)
        if built.controller is None:
            raise StudyError("the control 'equal_norm' copies a mechanism's norm; give it importance or step_scale.")
        if any(site.networks > 1 for site in built.gates):
            raise StudyError("the control 'equal_norm' does not know stacked experts; leave it out for this model.")
        sites = zip(built.controller.gates.sites, built.controller.layout.site_slices, strict=True)
        self._targets = [(entry.parameter, site.rows, own) for site, own in sites for entry in site.parameters()]
        self._before: list[Tensor] = []
        self._moved: list[Tensor] = []
        # Registered before the controller's own hook, which changes the step.
        built.optimizer.register_step_post_hook(self._keep_whole_step)

    def before_step(self, step: int) -> None:
        """Copies the rows."""
        self._before = [parameter.detach()[rows].clone() for parameter, rows, _ in self._targets]

    def _keep_whole_step(self, *_: Any) -> None:
        now = [parameter.detach()[rows] for parameter, rows, _ in self._targets]
        self._moved = [after - before for after, before in zip(now, self._before, strict=True)]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Replaces the mechanism's step by the uniform one."""
        assert self.built.controller is not None
        weights = self.built.controller.weights
        for (parameter, rows, own), before, moved in zip(self._targets, self._before, self._moved, strict=True):
            if not (weights[own] == 1.0).all():
                parameter[rows] = before + equal_norm_factor(moved, weights[own]) * moved


def equal_norm_factor(moved: Tensor, weights: Tensor) -> Tensor:
    """The factor c, a scalar, for which ‖c·moved‖ = ‖weights ⊙ moved‖; 1 where nothing moved.

    Args:
        moved: ``[rows, ...]``.
        weights: ``[rows]``.
    """
    squares = moved.reshape(len(moved), -1).square().sum(dim=1)
    total = squares.sum()
    factor = ((weights.to(squares).square() * squares).sum() / total.clamp(min=1e-30)).sqrt()
    return torch.where(total > 0, factor, torch.ones_like(factor))


class DoraIn(ArmHook):
    """Takes DoRA's magnitudes out of all layers but the chosen ones, before training.

    PEFT has DoRA for all of an adapter's layers or for none. A layer without a magnitude is one of plain LoRA: with
    B = 0, and a magnitude that starts as the norm of its row, both compute the base model.

    Args:
        built: The arm, with ``use_dora``.
        layers: Where DoRA stays, as :func:`lora_matrices` takes it.

    Raises:
        StudyError: The arm is not one of DoRA, or no layer has the name.
    """

    def __init__(self, built: BuiltArm, layers: str) -> None:
        super().__init__(built)
        chosen = {id(matrix) for matrix in lora_matrices(built, layers, ("lora_B",))}
        adapted = [module for module in built.model.modules() if is_lora_layer(module)]
        if not any(module.lora_magnitude_vector for module in adapted):
            raise StudyError("the hook 'DoraIn' leaves DoRA in some layers; give the arm peft: {use_dora: true}.")
        for module in adapted:
            if id(lora_b(module, "default").weight) not in chosen:
                module.lora_magnitude_vector.clear()
                module.lora_variant.clear()


HOOKS: dict[str, Any] = {"adalora": AdaLoraAllocation, "equal_norm": EqualNorm}


class CautiousRows(ArmHook):
    """A row of B waits where its step, made of old gradients, climbs on the gradient of this step.

    The norm of the step of each matrix is kept.

    Args:
        built: The arm.
        layers: See :func:`~benchmarks.study.arms.hooks.lora_matrices`.
    """

    def __init__(self, built: BuiltArm, layers: str = "gate") -> None:
        super().__init__(built)
        self._matrices = lora_matrices(built, layers, ("lora_B",))
        self._before: list[Tensor] = []

    def before_step(self, step: int) -> None:
        """Copies what the step will change."""
        self._before = [matrix.detach().clone() for matrix in self._matrices]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Takes back the steps of rows that wait."""
        for matrix, before in zip(self._matrices, self._before, strict=True):
            assert matrix.grad is not None
            moved = matrix - before
            kept = moved * ((moved * matrix.grad).sum(dim=1, keepdim=True) < 0)
            if kept.any():
                matrix.copy_(before + kept * (moved.norm() / kept.norm()))


class Lookahead(ArmHook):
    """Every few steps the weights go back a part of the way to where they were (Zhang and others, 2019).

    Selection then follows the direction that several steps agree on.

    Args:
        built: The arm.
        layers: See :func:`~benchmarks.study.arms.hooks.lora_matrices`.
        every: Steps between two such returns.
        share: Part of the way that is kept, in (0, 1].
    """

    def __init__(self, built: BuiltArm, layers: str = "gate", every: int = 5, share: float = 0.5) -> None:
        super().__init__(built)
        self._matrices = lora_matrices(built, layers, ("lora_A", "lora_B"))
        self._every, self._share = every, share
        self._slow = [matrix.detach().clone() for matrix in self._matrices]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Goes back where it is time."""
        if (step + 1) % self._every:
            return
        for matrix, slow in zip(self._matrices, self._slow, strict=True):
            slow.lerp_(matrix, self._share)
            matrix.copy_(slow)
