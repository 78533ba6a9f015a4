"""Writes what the gates do to the loggers of a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from na_lora_lightning.core.mechanisms.importance import TemporalImportance
from na_lora_lightning.core.mechanisms.metrics import as_floats


def write(trainer: Trainer, metrics: Mapping[str, Tensor], step: int) -> None:
    """Writes scalars to every logger of the trainer, with one device synchronisation."""
    if not metrics or not trainer.loggers:
        return
    named = as_floats(metrics)
    for logger in trainer.loggers:
        logger.log_metrics(named, step=step)


def write_histograms(trainer: Trainer, importance: TemporalImportance, labels: list[str], step: int) -> None:
    """Writes the responsiveness of each site's channels as a histogram to TensorBoard loggers."""
    for logger in trainer.loggers:
        if is_tensorboard(logger) and trainer.is_global_zero:
            experiment: Any = logger.experiment  # type: ignore[attr-defined]
            for label, columns in zip(labels, importance.layout.site_slices, strict=True):
                values = importance.responsiveness[columns].cpu()
                experiment.add_histogram(f"gate_responsiveness_of_channels/{label}", values, step)


def is_tensorboard(logger: object) -> bool:
    """Whether a logger is TensorBoard's; by name, as the two packages of Lightning have classes of their own."""
    return any(kind.__name__ == "TensorBoardLogger" for kind in type(logger).__mro__)
