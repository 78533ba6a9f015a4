"""Options of what is shown of the gates."""

from __future__ import annotations

from dataclasses import dataclass

from na_lora_lightning.errors import ConfigurationError


@dataclass(frozen=True)
class ViewOptions:
    """What a run shows of its gates, beside the curves over all layers.

    Attributes:
        layer_curves: Give loggers a curve for each layer too (``gate_responsiveness/layer_03``). By default they get
            those over all layers alone: a model of 30 layers has 300 curves, and heat maps and the report show the
            layers at a glance.
        picture_every_n_steps: Optimizer steps between two sets of heat maps for TensorBoard, W&B and MLflow, and for
            ``pictures`` in the run's folder; 0 for those at the end alone. A set takes about a second.
        history: Keep what is measured at logging steps in ``history.jsonl`` in the run's folder, which ``na-lora
            report`` reads.

    Raises:
        ConfigurationError: A number is out of range.
    """

    layer_curves: bool = False
    picture_every_n_steps: int = 500
    history: bool = True

    def __post_init__(self) -> None:
        if self.picture_every_n_steps < 0:
            raise ConfigurationError(
                f"view.picture_every_n_steps is {self.picture_every_n_steps}, and it counts optimizer steps; give 0 "
                "(at the end alone) or a positive number."
            )
