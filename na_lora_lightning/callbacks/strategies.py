"""What depends on Lightning's strategy: how sums are added over processes, and where the update can be reached."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from na_lora_lightning.errors import UpdateError


def require_supported_strategy(trainer: Trainer) -> None:
    """Checks that the optimizer of this strategy steps the model's own LoRA parameters.

    Raises:
        UpdateError: The strategy shards or copies parameters, so the update of a row cannot be reached.
    """
    if not _is_a(trainer.strategy, SingleDeviceStrategy, DDPStrategy):
        raise UpdateError(
            f"the strategy {type(trainer.strategy).__name__} shards or copies the LoRA parameters, so the update of a "
            "gate's rows cannot be reached; use a single device or strategy='ddp'."
        )


def reduce_over_processes(trainer: Trainer) -> Callable[[Tensor], None] | None:
    """A function that adds a tensor over all processes in place, or None for one process."""
    if trainer.world_size == 1:
        return None

    def reduce(tensor: Tensor) -> None:
        torch.distributed.all_reduce(tensor)

    return reduce


def _is_a(strategy: object, *kinds: type) -> bool:
    """Whether a strategy is one of ``kinds``, of ``lightning`` or of ``pytorch_lightning``, whose classes differ."""
    names = {kind.__name__ for kind in kinds}
    return any(kind.__name__ in names for kind in type(strategy).__mro__)
