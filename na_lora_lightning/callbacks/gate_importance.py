"""Callback of mechanism one: the derivative-based temporal-importance mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lightning.pytorch import Trainer

from na_lora_lightning.callbacks.gate_callback import GateCallback, explains
from na_lora_lightning.callbacks.monitor import write_histograms
from na_lora_lightning.callbacks.session import GateSettings
from na_lora_lightning.callbacks.view_options import ViewOptions
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.mechanisms.importance import TemporalImportance
from na_lora_lightning.core.mechanisms.importance_options import Criterion, ImportanceOptions, ImportanceVariant, Scope
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.errors import ConfigurationError


@explains(GateSettings)
@explains(ImportanceOptions)
class GateImportanceCallback(GateCallback):
    """Lets only the LoRA rows of responsive gate channels move.

    At each optimizer step the mean responsiveness of every gate channel over the step's real tokens enters a moving
    average, its temporal importance. After a warm-up the rows of ``lora_B`` that make the most important channels
    take the optimizer's step, and the others stay where they are. The forward pass, the loss, the gradients, the
    optimizer's state and the learning-rate schedule are not touched. With ``keep_fraction=1.0`` training is bitwise
    that of plain LoRA and the callback only watches; where it is alone it then also logs the curves of
    :class:`~na_lora_lightning.callbacks.step_scale.StepScaleCallback`, with the default step scale as it would be by
    the logged step alone.

    Why the defaults are what they are is said at
    :class:`~na_lora_lightning.core.mechanisms.importance_options.ImportanceOptions`.

    Logged on logging steps, over all layers: ``gates/responsiveness``, ``gates/mask_churn``,
    ``gates/selection_misalignment`` and ``gates/selection_share``; by layer too where ``view`` asks for it.

    Args:
        (those of ImportanceOptions)
        variant: Rarer choices, and controls for experiments.
        histogram_every_n_steps: Optimizer steps between two histograms of channel responsiveness, 0 for none.
        (those of GateSettings)

    Raises:
        ConfigurationError: An argument is out of range.

    Example::

        trainer = Trainer(callbacks=[GateImportanceCallback()])
        trainer.fit(lightning_module_with_a_peft_model_inside)
    """

    def __init__(
        self,
        keep_fraction: float = ImportanceOptions.keep_fraction,
        beta: float = ImportanceOptions.beta,
        criterion: Criterion = ImportanceOptions.criterion,
        scope: Scope = ImportanceOptions.scope,
        warmup_steps: int = ImportanceOptions.warmup_steps,
        refresh_every: int = ImportanceOptions.refresh_every,
        variant: ImportanceVariant = ImportanceVariant(),
        observer: ObserverOptions = ObserverOptions(),
        histogram_every_n_steps: int = 100,
        allow_unmasked_gates: bool = False,
        example_inputs: Mapping[str, Any] | None = None,
        view: ViewOptions = ViewOptions(),
    ) -> None:
        super().__init__(GateSettings(observer, allow_unmasked_gates, example_inputs, view))
        self.options = ImportanceOptions(
            keep_fraction=keep_fraction,
            beta=beta,
            criterion=criterion,
            scope=scope,
            warmup_steps=warmup_steps,
            refresh_every=refresh_every,
            **asdict(variant),
        )
        if histogram_every_n_steps < 0:
            raise ConfigurationError(
                f"histogram_every_n_steps is {histogram_every_n_steps}, and it counts optimizer steps; give 0 for no "
                "histograms or a positive number."
            )
        self._histogram_every_n_steps = histogram_every_n_steps

    def _turn_on(self, controller: GateController) -> TemporalImportance:
        return controller.set_importance(self.options)

    def _after_step(self, trainer: Trainer, controller: GateController, step: int) -> None:
        assert controller.importance is not None
        every = self._histogram_every_n_steps
        if every and (controller.importance.steps - 1) % every == 0:
            write_histograms(trainer, controller.importance, controller.gates.labels, step)
