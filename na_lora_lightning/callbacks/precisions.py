"""What depends on Lightning's precision: in which dtypes the probe runs the model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch import Trainer


def probing_precision(trainer: Trainer) -> AbstractContextManager[None]:
    """The autocast of a mixed precision, without which a model of several dtypes may not run at all.

    The other precisions have converted the model by then. Their context changes the dtype of new tensors, in which
    activations could not be told apart.
    """
    is_mixed = str(trainer.precision).endswith("-mixed")
    context: AbstractContextManager[None] = trainer.precision_plugin.forward_context() if is_mixed else nullcontext()
    return context


def in_training_dtype(trainer: Trainer, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Example inputs as the trainer converts batches: floating ones to the dtype of "bf16-true", say."""
    converted: Mapping[str, Any] = trainer.precision_plugin.convert_input(dict(inputs))
    return converted
