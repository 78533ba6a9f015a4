"""What validation found at which step, and which step an adapter is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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
