"""What validation found at which step, which checkpoint is the best by it, and which step an adapter is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import ModelCheckpoint

from na_lora_lightning.checkpoints.files import AtomicCheckpointIO
from na_lora_lightning.errors import ConfigurationError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


STAGE = "validation/"


@dataclass(frozen=True)
class Measurement:
    """What validation found at one step.

    Attributes:
        label: Which one it is.
        step: Optimizer steps until then; None for one that is not known.
        metrics: By name.
    """

    label: str
    step: int | None
    metrics: Mapping[str, float]


class WrittenAdapter(NamedTuple):
    """An adapter folder.

    Attributes:
        folder: Where it is.
        weights: Which step its weights are of, in words.
    """

    folder: Path
    weights: str


def validation_metrics(trainer: Trainer) -> dict[str, float]:
    """What the validation that has just ended logged, by name."""
    return {
        validation_name(name): float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith(STAGE)
    }


def validation_name(name: str) -> str:
    """A metric's name without that of the stage."""
    return name.removeprefix(STAGE)


def heading(label: str, step: int | None) -> str:
    """A label with its step, as tables have it."""
    return f"{label} (unknown step)" if step is None else f"{label} (step {step})"


# What grows by itself is not a metric: the best of it is the last.
_COUNTERS = ("step", "epoch")


def monitored_checkpoint(trainer: Trainer) -> ModelCheckpoint:
    """The first of a trainer's checkpoint callbacks that keeps the best by a metric.

    Raises:
        ConfigurationError: There is none.
    """
    for callback in trainer.checkpoint_callbacks:
        if (
            isinstance(callback, ModelCheckpoint)
            and callback.monitor is not None
            and callback.monitor not in _COUNTERS
            and callback.save_top_k != 0
        ):
            return callback
    raise ConfigurationError(
        "adapter.write is 'best', and no checkpoint callback keeps the best by a metric; add a ModelCheckpoint with "
        "monitor (such as 'validation/loss') and mode to trainer.callbacks, or set adapter.write to 'last'."
    )


def load_best(callback: ModelCheckpoint) -> tuple[dict[str, Any], str, Measurement]:
    """Loads the best checkpoint that a callback has saved.

    Args:
        callback: With a ``best_model_path``.

    Returns:
        The checkpoint, which step it is of in words, and what validation found there.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    checkpoint: dict[str, Any] = AtomicCheckpointIO().load_checkpoint(callback.best_model_path, weights_only=True)
    step, monitor = int(checkpoint["global_step"]), str(callback.monitor)
    score = None if callback.best_model_score is None else float(callback.best_model_score)
    measured = {} if score is None else {validation_name(monitor): score}
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, dict) and state.get("step_after") == step:
            # What the summary of the fit had measured.
            measured = dict(state["metrics_after"])
    words = f"step {step}, the best {monitor}" + ("" if score is None else f" ({score:.4g})")
    return checkpoint, words, Measurement("best", step, measured)
