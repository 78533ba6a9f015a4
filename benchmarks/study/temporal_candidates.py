"""Candidates that look at how a layer moves from step to step, rather than at which of its channels respond."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.study.errors import StudyError
from benchmarks.study.hooks import ArmHook
from na_lora_lightning.core.lora_layers import lora_a, lora_b

if TYPE_CHECKING:
    from benchmarks.study.arms import BuiltArm

_LAYERS = ("gate", "others", "all")


def lora_matrices(built: BuiltArm, layers: str, kinds: tuple[str, ...]) -> list[Tensor]:
    """The trained matrices of some layers.

    Args:
        built: The arm.
        layers: ``"gate"``, ``"others"`` (all but the gates) or ``"all"``.
        kinds: Of ``"lora_A"`` and ``"lora_B"``.

    Raises:
        StudyError: ``layers`` is another word.
    """
    if layers not in _LAYERS:
        raise StudyError(f"the layers are {layers!r}; choose one of {', '.join(_LAYERS)}.")
    of_gates = {id(matrix(site.lora_layer, "default").weight) for site in built.gates for matrix in (lora_a, lora_b)}
    return [
        parameter
        for name, parameter in built.model.named_parameters()
        if parameter.requires_grad
        and any(kind in name for kind in kinds)
        and (layers == "all" or (id(parameter) in of_gates) == (layers == "gate"))
    ]


class CautiousRows(ArmHook):
    """A row of B waits where its step, made of old gradients, climbs on the gradient of this step.

    The norm of the step of each matrix is kept.

    Args:
        built: The arm.
        layers: See :func:`lora_matrices`.
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
        layers: See :func:`lora_matrices`.
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
