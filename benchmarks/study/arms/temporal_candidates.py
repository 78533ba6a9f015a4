"""Candidates that look at how a layer moves from step to step, rather than at which of its channels respond."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.study.arms.hooks import ArmHook, BuiltArm, lora_matrices


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
