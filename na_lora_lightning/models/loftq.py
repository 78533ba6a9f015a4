"""LoRA that begins with what the quantisation of its base lost (LoftQ, one step of it, on the base as it is loaded)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from na_lora_lightning.arguments import LoRAOptions
from na_lora_lightning.base_quantization import BaseQuantization
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.models.loading import load_base_model
from na_lora_lightning.models.quantization import QuantizationOptions, stored_quantization
from na_lora_lightning.models.source import BaseModelSource, load_config
from na_lora_lightning.peft_internals import is_lora

if TYPE_CHECKING:
    from peft import PeftModel

_FOUR_BITS = ("nf4", "fp4")


def own_base(lora: LoRAOptions, kind: str | None, double: bool = True) -> BaseQuantization | None:
    """The base to which alone an adapter will belong; None where it is for its base in any form.

    Args:
        lora: What is trained.
        kind: How the base is quantised, as in :class:`~na_lora_lightning.QuantizationOptions`.
        double: Whether its scales are quantised too.

    Raises:
        ConfigurationError: LoRA is to begin with what four bits lost, and the base is not in four bits.
    """
    if lora.init_lora_weights != "loftq":
        return None
    if kind not in _FOUR_BITS:
        raise ConfigurationError(
            f"lora.init_lora_weights='loftq' begins with what four bits lost of the base, and quantization.kind is "
            f"{kind!r}; set it to 'nf4' or 'fp4', or leave 'loftq' out."
        )
    return BaseQuantization(kind, double)


@torch.no_grad()
def begin_with_loftq(model: PeftModel, source: BaseModelSource) -> int:
    """Gives A and B of every layer on four-bit weights the best part of rank r of what these lost.

    With W the stored weight, Q the one that its four bits stand for, and s LoRA's scale, s·BA is the first r terms of
    the singular value decomposition of W − Q, each shared between A and B by the square root of its value. This is what
    ``peft.replace_lora_weights_loftq`` computes on a GPU where s is 1, here on any device. The base stays as it was
    quantised, so that it is made again when the adapter is loaded.

    Args:
        model: The PEFT model, changed in place.
        source: Its base, which is loaded once more, as it is stored, to the CPU.

    Returns:
        The number of layers; those on other weights keep their start.

    Raises:
        ConfigurationError: The base is stored quantised, or no layer is on four-bit weights.
    """
    from bitsandbytes.functional import dequantize_4bit

    method = stored_quantization(load_config(source))
    if method is not None:
        raise ConfigurationError(
            f"lora.init_lora_weights='loftq' begins with what a quantisation lost, and {source.name_or_path!r} is "
            f"stored quantised ({method}); give the model that it was made from."
        )
    with torch.device("cpu"):
        stored = load_base_model(replace(source, quantization=QuantizationOptions(), dtype="auto"), None)
    count = 0
    for name, module in model.get_base_model().named_modules():
        layer: Any = module
        if not is_lora(module) or "default" not in layer.lora_A:
            continue
        weight = layer.get_base_layer().weight
        state = getattr(weight, "quant_state", None)
        if state is None:
            continue
        held = dequantize_4bit(weight.data, state).float()
        original: Any = stored.get_submodule(name)
        lost = original.weight.to(held) - held
        left, values, right = torch.linalg.svd(lost, full_matrices=False)
        # A rank above that of the layer leaves rows of A as they begin, and nothing in B for them.
        roots = values[: layer.r["default"]].sqrt()
        rank = len(roots)
        layer.lora_B["default"].weight[:, :rank] = left[:, :rank] * roots / layer.scaling["default"]
        layer.lora_A["default"].weight[:rank] = roots[:, None] * right[:rank]
        count += 1
    if not count:
        raise ConfigurationError(
            f"lora.init_lora_weights='loftq' found no LoRA on quantised weights of {source.name_or_path!r}; leave it "
            "out."
        )
    return count
