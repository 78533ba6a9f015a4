"""DoRA in some layers and plain LoRA in the others: in which layers does it gain?"""

from __future__ import annotations

from benchmarks.study.arms.hooks import ArmHook, BuiltArm, lora_matrices
from benchmarks.study.errors import StudyError
from na_lora_lightning.core.lora_layers import is_lora_layer, lora_b


class DoraIn(ArmHook):
    """Takes DoRA's magnitudes out of all layers but the chosen ones, before training.

    PEFT has DoRA for all of an adapter's layers or for none. A layer without a magnitude is one of plain LoRA: with
    B = 0, and a magnitude that starts as the norm of its row, both compute the base model.

    Args:
        built: The arm, with ``use_dora``.
        layers: Where DoRA stays, as :func:`~benchmarks.study.arms.hooks.lora_matrices` takes it.

    Raises:
        StudyError: The arm is not one of DoRA, or no layer has the name.
    """

    def __init__(self, built: BuiltArm, layers: str) -> None:
        super().__init__(built)
        chosen = {id(matrix) for matrix in lora_matrices(built, layers, ("lora_B",))}
        adapted = [module for module in built.model.modules() if is_lora_layer(module)]
        if not any(module.lora_magnitude_vector for module in adapted):
            raise StudyError("the hook 'DoraIn' leaves DoRA in some layers; give the arm peft: {use_dora: true}.")
        for module in adapted:
            if id(lora_b(module, "default").weight) not in chosen:
                module.lora_magnitude_vector.clear()
                module.lora_variant.clear()
