"""What depends on how Lightning calls an optimizer: with a closure that runs the training step."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from torch.optim import LBFGS, Optimizer

from na_lora_lightning.errors import ConfigurationError


def require_whole_closure(trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
    """Checks that an optimizer which evaluates its closure several times sees the whole step in it.

    Raises:
        ConfigurationError: LBFGS steps after several micro-batches, the last of which alone is in its closure.
    """
    several = trainer.accumulate_grad_batches > 1 and pl_module.automatic_optimization
    if several and isinstance(optimizer, LBFGS):
        raise ConfigurationError(
            f"{type(optimizer).__name__} evaluates its closure several times, and with accumulate_grad_batches="
            f"{trainer.accumulate_grad_batches} Lightning adds the last micro-batch's gradient each time; set "
            "accumulate_grad_batches to 1 and make batches larger."
        )
