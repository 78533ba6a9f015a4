"""Controls that no option of the package says, as callbacks."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from na_lora_lightning.callbacks.model_search import find_peft_model
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.sites import GateMap


def lora_plus(model: nn.Module, lr: float, ratio: float = 16.0, weight_decay: float = 0.0) -> Optimizer:
    """LoRA+: AdamW whose rate for ``lora_B`` is a multiple of that for ``lora_A``.

    Args:
        model: A PEFT model.
        lr: Learning rate of ``lora_A``.
        ratio: The multiple.
        weight_decay: Of all; PEFT's own function leaves torch's default of 0.01 where it is not told.

    Returns:
        The optimizer.
    """
    from peft.optimizers import create_loraplus_optimizer

    made: Optimizer = create_loraplus_optimizer(
        model,  # type: ignore[arg-type]
        torch.optim.AdamW,
        lr=lr,
        loraplus_lr_ratio=ratio,
        weight_decay=weight_decay,
    )
    return made


class GateStepCallback(Callback):
    """Base: changes the optimizer's step of the rows of ``lora_B`` that make gate channels.

    The gates are found before training, and :meth:`weights` is asked after each step of the optimizer.
    """

    def __init__(self) -> None:
        self.gates = GateMap()
        self.steps = 0
        self._rows: list[tuple[Tensor, Any, int]] = []
        self._before: list[Tensor] = []
        self._handles: list[Any] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the gates, and follows the optimizers."""
        self.gates = discover_gates(find_peft_model(pl_module)).require(allow_unmasked_gates=True)
        self.steps = 0
        self._rows = [
            (entry.parameter, site.rows, index) for index, site in enumerate(self.gates) for entry in site.parameters()
        ]
        self.begin(trainer)
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets go of them."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._before = [], []
        self.end()

    def begin(self, trainer: Trainer) -> None:
        """Called before the first step."""

    def end(self) -> None:
        """Called after the last step."""

    def before_step(self) -> None:
        """Called when the gradients are there, before they are clipped and the optimizer sees them."""

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Copies the rows; the optimizer is within its step already, and has not changed them yet."""
        self.steps += 1
        with torch.no_grad():
            self.before_step()
            self._before = [parameter.detach()[rows].clone() for parameter, rows, _ in self._rows]

    def weights(self, index: int, moved: Tensor) -> Tensor | float | None:
        """What the step of a site's rows is multiplied by.

        Args:
            index: Of the site in ``gates``.
            moved: The optimizer's step, ``[rows, rank]``.

        Returns:
            A number or ``[rows]``; None leaves the step as it is.
        """
        return None

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        for (parameter, rows, index), before in zip(self._rows, self._before, strict=True):
            moved = parameter.detach()[rows] - before
            weights = self.weights(index, moved)
            if weights is not None:
                scaled = weights * moved if isinstance(weights, float) else weights[:, None] * moved
                parameter.detach()[rows] = before + scaled


class ShortGateSteps(GateStepCallback):
    """Plain LoRA whose gate rows take shorter steps: what a mask or a step scale does without choosing channels.

    Args:
        factor: What each step is multiplied by; 0 leaves the gates as they are. The default mask, which holds a tenth
            of the rows, leaves about √0.9 = 0.95 of a step's norm.
    """

    def __init__(self, factor: float = 0.95) -> None:
        super().__init__()
        self.factor = factor

    @override
    def weights(self, index: int, moved: Tensor) -> float:
        """The factor."""
        return self.factor
