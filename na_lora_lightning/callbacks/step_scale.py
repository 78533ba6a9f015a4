"""Callback of mechanism two: the activation-specific step scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from na_lora_lightning.callbacks.gate_callback import GateCallback, explains
from na_lora_lightning.callbacks.session import GateSettings
from na_lora_lightning.callbacks.view_options import ViewOptions
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.mechanisms.step_scale import StepScale
from na_lora_lightning.core.mechanisms.step_scale_options import Granularity, StepScaleOptions
from na_lora_lightning.core.observation.observer import ObserverOptions


@explains(GateSettings)
@explains(StepScaleOptions)
class StepScaleCallback(GateCallback):
    """Shortens the LoRA steps of gate channels whose activation is far from homogeneous.

    The observed pre-activations are parted into suppressed, transitional and homogeneous by the effective
    homogeneity E; the step of the gate rows is scaled by η = Σ_R p_R·c_R with c_R = 1/(1 + mean |E−1| in R). Where
    the partition is not meaningful η is exactly 1. The step of ``lora_A`` of the gate layers, which moves the selection
    of all channels at once, can be shortened by ``matrix_a_factor``. Works alone or beside
    :class:`~na_lora_lightning.callbacks.gate_importance.GateImportanceCallback`, in either order.

    Why the defaults are what they are is said at
    :class:`~na_lora_lightning.core.mechanisms.step_scale_options.StepScaleOptions`.

    Logged on logging steps, over all layers: ``gates/regime_suppressed``, ``gates/regime_homogeneous``,
    ``gates/step_scale_deviation`` (or ``gates/step_scale``), ``gates/selection_misalignment`` and
    ``gates/selection_share``; by layer too where ``view`` asks for it.

    Args:
        (those of StepScaleOptions)
        (those of GateSettings)

    Raises:
        ConfigurationError: An argument is out of range.

    Example::

        trainer = Trainer(callbacks=[StepScaleCallback()])
        trainer.fit(lightning_module_with_a_peft_model_inside)
    """

    def __init__(
        self,
        granularity: Granularity = StepScaleOptions.granularity,
        tau: float = StepScaleOptions.tau,
        eta_min: float = StepScaleOptions.eta_min,
        normalize: bool = StepScaleOptions.normalize,
        beta: float = StepScaleOptions.beta,
        matrix_a_factor: float = StepScaleOptions.matrix_a_factor,
        observer: ObserverOptions = ObserverOptions(),
        allow_unmasked_gates: bool = False,
        example_inputs: Mapping[str, Any] | None = None,
        view: ViewOptions = ViewOptions(),
    ) -> None:
        super().__init__(GateSettings(observer, allow_unmasked_gates, example_inputs, view))
        self.options = StepScaleOptions(
            granularity=granularity,
            tau=tau,
            eta_min=eta_min,
            normalize=normalize,
            beta=beta,
            matrix_a_factor=matrix_a_factor,
        )

    def _turn_on(self, controller: GateController) -> StepScale:
        return controller.set_step_scale(self.options)
