"""Callback of mechanism two: the activation-specific step scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from na_lora_lightning.callbacks.gate_callback import GateCallback
from na_lora_lightning.callbacks.session import GateSettings
from na_lora_lightning.callbacks.view_options import ViewOptions
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.mechanisms.step_scale import StepScale
from na_lora_lightning.core.mechanisms.step_scale_options import Granularity, StepScaleOptions
from na_lora_lightning.core.observation.observer import ObserverOptions


class StepScaleCallback(GateCallback):
    """Shortens the LoRA steps of gate channels whose activation is far from homogeneous.

    The observed pre-activations are parted into suppressed, transitional and homogeneous by the effective
    homogeneity E; the step of the gate rows is scaled by η = Σ_R p_R·c_R with c_R = 1/(1 + mean |E−1| in R). Where
    the partition is not meaningful η is exactly 1. The step of ``lora_A`` of the gate layers, which moves the selection
    of all channels at once, can be shortened by ``matrix_a_factor``. Works alone or beside
    :class:`~na_lora_lightning.callbacks.gate_importance.GateImportanceCallback`, in either order.

    Why the defaults are what they are is said at
    :class:`~na_lora_lightning.core.mechanisms.step_scale_options.StepScaleOptions`.

    Logged on logging steps, by layer and by activation: ``gate_regime_suppressed``, ``gate_regime_transitional``,
    ``gate_regime_homogeneous``, ``gate_step_scale`` (and over channels ``gate_step_scale_deviation``),
    ``selection_misalignment`` and ``selection_share``.

    Args:
        granularity: One scale per ``"activation"``, per ``"site"`` or per gate ``"channel"``.
        tau: τ, half-width of the homogeneous regime |E−1| ≤ τ, in (0, 1), with the effective homogeneity
            E(z) = z·φ'(z)/φ(z) of the activation φ.
        eta_min: Lowest factor of a regime, in (0, 1]; the step scale is the mean of these factors by share.
        normalize: Divide the scales by their mean over what encloses them, so that steps are redistributed and not
            made smaller.
        beta: β of the moving average of the regime shares, in [0, 1).
        matrix_a_factor: Factor on the step of ``lora_A`` of the gate layers, which moves the selection of all their
            channels at once, in [0, 1].
        observer: What the statistics look at.
        allow_unmasked_gates: Accept that some gates have no LoRA instead of stopping with their names.
        example_inputs: Keyword arguments of one small forward pass, for models without a vocabulary.
        view: What is shown, beside the curves over all layers.

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
