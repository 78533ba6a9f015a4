"""Nonlinearity-aware LoRA for PyTorch Lightning.

The public names are imported on first use, so that ``import na_lora_lightning`` stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "NALoRALightningModule": "na_lora_lightning.modules.language",
    "InstructionDataModule": "na_lora_lightning.data",
    "VisionInstructionDataModule": "na_lora_lightning.data",
    "GateImportanceCallback": "na_lora_lightning.callbacks.gate_importance",
    "StepScaleCallback": "na_lora_lightning.callbacks.step_scale",
    "FitSummaryCallback": "na_lora_lightning.modules.fit_summary",
    "RunCheckpoint": "na_lora_lightning.checkpoints.callbacks",
    "ResumableCurves": "na_lora_lightning.checkpoints.callbacks",
    "AtomicCheckpointIO": "na_lora_lightning.checkpoints.files",
    "nonlinearity_aware": "na_lora_lightning.plain_pytorch",
    "NALoRATrainerCallback": "na_lora_lightning.transformers_callback",
    "discover_gates": "na_lora_lightning.core.discovery.gates",
    "lora_targets": "na_lora_lightning.models.targets",
    "DualEncoderLightningModule": "na_lora_lightning.modules.dual_encoder",
    "LabelledImageDataModule": "na_lora_lightning.data.classes.datamodule",
    "ImportanceOptions": "na_lora_lightning.core.mechanisms.importance_options",
    "ImportanceVariant": "na_lora_lightning.core.mechanisms.importance_options",
    "StepScaleOptions": "na_lora_lightning.core.mechanisms.step_scale_options",
    "ObserverOptions": "na_lora_lightning.core.observation.observer",
    "AdapterArguments": "na_lora_lightning.arguments",
    "EvaluationArguments": "na_lora_lightning.arguments",
    "LoRAArguments": "na_lora_lightning.arguments",
    "LossArguments": "na_lora_lightning.arguments",
    "ScheduleArguments": "na_lora_lightning.arguments",
    "keep_inputs_uncast": "na_lora_lightning.models.lora_inputs",
}

__all__ = [*_EXPORTS, "__version__"]

if TYPE_CHECKING:
    from na_lora_lightning.arguments import (
        AdapterArguments,
        EvaluationArguments,
        LoRAArguments,
        LossArguments,
        ScheduleArguments,
    )
    from na_lora_lightning.callbacks.gate_importance import GateImportanceCallback
    from na_lora_lightning.callbacks.step_scale import StepScaleCallback
    from na_lora_lightning.checkpoints.callbacks import ResumableCurves, RunCheckpoint
    from na_lora_lightning.checkpoints.files import AtomicCheckpointIO
    from na_lora_lightning.core.discovery.gates import discover_gates
    from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions, ImportanceVariant
    from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions
    from na_lora_lightning.core.observation.observer import ObserverOptions
    from na_lora_lightning.data import InstructionDataModule, VisionInstructionDataModule
    from na_lora_lightning.data.classes.datamodule import LabelledImageDataModule
    from na_lora_lightning.models.lora_inputs import keep_inputs_uncast
    from na_lora_lightning.models.targets import lora_targets
    from na_lora_lightning.modules.dual_encoder import DualEncoderLightningModule
    from na_lora_lightning.modules.fit_summary import FitSummaryCallback
    from na_lora_lightning.modules.language import NALoRALightningModule
    from na_lora_lightning.plain_pytorch import nonlinearity_aware
    from na_lora_lightning.transformers_callback import NALoRATrainerCallback


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
