"""LoRA that begins with what the quantisation of its base lost (LoftQ, one step of it, on the base as it is loaded)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.models.loading import load_base_model
from na_lora_lightning.models.quantization import QuantizationOptions
from na_lora_lightning.models.source import BaseModelSource

if TYPE_CHECKING:
    from peft import PeftModel

_FOUR_BITS = ("nf4", "fp4")


def require_four_bits(source: BaseModelSource) -> None:
    """Refuses LoftQ on a base that is not quantised to four bits by bitsandbytes.

    Raises:
        ConfigurationError: It is not.
    """
    if source.quantization.kind not in _FOUR_BITS:
        raise ConfigurationError(
            "lora.init_lora_weights='loftq' begins with what a quantisation to four bits lost, and "
            f"quantization.kind is {source.quantization.kind!r}; set it to 'nf4' or 'fp4', or leave loftq out."
        )


@torch.no_grad()
def begin_with_loftq(model: PeftModel, source: BaseModelSource) -> int:
    """Gives A and B of every layer on four-bit weights the best part of rank r of what these lost.

    With W the stored weight, Q the one that its four bits stand for, and s LoRA's scale, s·BA is the first r terms of
    the singular value decomposition of W − Q, each shared between A and B by the square root of its value. This is what
    ``peft.replace_lora_weights_loftq`` computes where s is 1, on any device. The base stays as it was quantised, so
    that it is made again when the adapter is loaded.

    Args:
        model: The PEFT model, changed in place.
        source: Its base, which is loaded once more, in full precision, to the CPU.

    Returns:
        The number of layers; those on other weights keep their start.

    Raises:
        ConfigurationError: No layer is on four-bit weights.
    """
    from bitsandbytes.functional import dequantize_4bit

    stored = load_base_model(replace(source, quantization=QuantizationOptions(), dtype="float32"), None)
    count = 0
    for name, module in model.get_base_model().named_modules():
        layer: Any = module
        if "default" not in getattr(layer, "lora_A", {}):
            continue
        weight = layer.get_base_layer().weight
        state = getattr(weight, "quant_state", None)
        if state is None:
            continue
        held = dequantize_4bit(weight.data, state).float()
        lost = stored.get_parameter(f"{name}.weight").to(held) - held
        left, values, right = torch.linalg.svd(lost, full_matrices=False)
        rank = layer.r["default"]
        roots = values[:rank].sqrt()
        layer.lora_B["default"].weight.copy_(left[:, :rank] * roots / layer.scaling["default"])
        layer.lora_A["default"].weight.copy_(roots[:, None] * right[:rank])
        count += 1
    if not count:
        raise ConfigurationError(
            f"lora.init_lora_weights='loftq' found no LoRA on quantised weights of {source.name_or_path!r}; leave it "
            "out."
        )
    return count
