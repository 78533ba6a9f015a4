"""Base models whose frozen weights are quantised when they are loaded, by bitsandbytes or torchao."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from na_lora_lightning.errors import ConfigurationError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Kind = Literal["nf4", "fp4", "int8", "torchao_int8", "torchao_int4"]
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class QuantizationOptions:
    """In what form the frozen weights of the base model are held.

    Args:
        kind: ``"nf4"``, ``"fp4"`` and ``"int8"`` by bitsandbytes, ``"torchao_int8"`` and ``"torchao_int4"`` by torchao;
            None leaves them as they are. LoRA itself is float32.
        double: Quantise the scales of ``nf4`` and ``fp4`` too.
        compute_dtype: What ``nf4`` and ``fp4`` are turned into to compute; ``"auto"`` is bfloat16 on a CUDA device and
            float32 elsewhere.

    Raises:
        ConfigurationError: A value is unknown, or the library that it needs is not installed.
    """

    kind: Kind | None = None
    double: bool = True
    compute_dtype: ComputeDtype = "auto"

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in get_args(Kind):
            names = ", ".join(map(repr, get_args(Kind)))
            raise ConfigurationError(f"quantization.kind={self.kind!r} is unknown; use one of {names}, or null.")
        if self.compute_dtype not in get_args(ComputeDtype):
            names = ", ".join(map(repr, get_args(ComputeDtype)))
            raise ConfigurationError(
                f"quantization.compute_dtype={self.compute_dtype!r} is unknown; use one of {names}."
            )
        for library in () if self.kind is None else (self.package, "accelerate"):
            try:
                version(library)
            except PackageNotFoundError as error:
                raise ConfigurationError(
                    f"quantization.kind={self.kind!r} needs the package {library}, which is not installed; "
                    "pip install 'na-lora-lightning[quantization]'."
                ) from error

    @property
    def package(self) -> str:
        """What quantises."""
        return "torchao" if str(self.kind).startswith("torchao") else "bitsandbytes"


def loading_options(quantization: QuantizationOptions, device: torch.device | None) -> dict[str, Any]:
    """What ``from_pretrained`` is given to quantise a model; nothing where it is not to be.

    Args:
        quantization: How.
        device: Where the model goes, as it cannot be moved freely later; None stands for the CPU.
    """
    if quantization.kind is None:
        return {}
    device = device or torch.device("cpu")
    return {"quantization_config": _config(quantization, device), "device_map": {"": device}}


def _config(quantization: QuantizationOptions, device: torch.device) -> Any:
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if quantization.kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization.package == "bitsandbytes":
        wanted = quantization.compute_dtype
        if wanted == "auto":
            wanted = "bfloat16" if device.type == "cuda" else "float32"
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.kind,
            bnb_4bit_use_double_quant=quantization.double,
            bnb_4bit_compute_dtype=getattr(torch, wanted),
        )
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if quantization.kind == "torchao_int8" else Int4WeightOnlyConfig())


def stored_quantization(config: PreTrainedConfig) -> str | None:
    """By which method the weights of a model are quantised as they are stored; None where they are not."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    values = found if isinstance(found, dict) else found.to_dict()
    return str(values.get("quant_method", "an unknown method")).rpartition(".")[2].lower()


def dequantized(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The model with ordinary weights, those that its quantised ones stand for.

    Raises:
        ConfigurationError: transformers cannot do that for this method.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return model
    plain = model
    try:
        if stored_quantization(model.config) == "torchao":
            # For which transformers has none.
            _dequantize_tensors(model)
            quantizer.remove_quantization_config(model)
        else:
            plain = model.dequantize()
    except (NotImplementedError, AttributeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(
            f"the quantised weights of {name!r} cannot be turned into ordinary ones ({one_line(error)}); give the "
            "model that they were made from."
        ) from error
    # How to read what was stored quantised, which transformers would reverse on saving.
    conversions: Any = getattr(plain, "_weight_conversions", None)
    if conversions:
        plain._weight_conversions = [entry for entry in conversions if not _is_of_quantizer(entry)]  # type: ignore[assignment]
    return plain


def _dequantize_tensors(model: PreTrainedModel) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if type(parameter) is not nn.Parameter or type(parameter.data) is not torch.Tensor:
                setattr(module, name, nn.Parameter(parameter.dequantize(), requires_grad=False))


def _is_of_quantizer(conversion: Any) -> bool:
    operations = getattr(conversion, "operations", None) or ()
    return any(type(operation).__module__.startswith("transformers.integrations.") for operation in operations)
