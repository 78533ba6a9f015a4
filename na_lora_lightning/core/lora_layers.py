"""The little that the core needs to know about PEFT's LoRA layers.

PEFT is recognised by its attributes and not imported, so that the core stays light and also works on models in
which LoRA layers were injected without a ``PeftModel`` around them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from na_lora_lightning.errors import DiscoveryError, UpdateError


@dataclass(frozen=True)
class LoRARows:
    """A trainable parameter whose first dimension runs over the outputs of a LoRA layer.

    Attributes:
        name: Qualified name, for messages.
        parameter: ``[out_features, ...]``.
    """

    name: str
    parameter: nn.Parameter


def is_lora_layer(module: nn.Module) -> bool:
    """Whether ``module`` is a PEFT LoRA layer around a linear base layer."""
    return hasattr(module, "lora_B") and hasattr(module, "lora_A") and hasattr(module, "base_layer")


def is_on_parameter(module: nn.Module) -> bool:
    """Whether a LoRA layer adds its product to a parameter (PEFT's ``target_parameters``), not to a layer's output."""
    return hasattr(module, "parameter_name")


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer (quantised ones subclass ``nn.Linear``) or GPT-2's ``Conv1D``."""
    # Sharding makes a subclass of a module's class.
    return isinstance(module, nn.Linear) or any(kind.__name__ == "Conv1D" for kind in type(module).__mro__)


def active_adapters(layer: nn.Module) -> list[str]:
    """Names of the active adapters that this LoRA layer holds."""
    return [name for name in getattr(layer, "active_adapters", []) if name in layer.lora_B]  # type: ignore[operator]


def lora_a(layer: nn.Module, adapter: str) -> nn.Module:
    """The module whose weight is A, ``[r, in_features]``."""
    return layer.lora_A[adapter]  # type: ignore[index, return-value]


def lora_b(layer: nn.Module, adapter: str) -> nn.Module:
    """The module whose weight is B, ``[out_features, r]``."""
    return layer.lora_B[adapter]  # type: ignore[index, return-value]


def scaling(layer: nn.Module, adapter: str) -> float:
    """The factor s in δ = s·B·A·x."""
    return float(layer.scaling[adapter])  # type: ignore[index]


def lora_rows(layer: nn.Module, layer_name: str) -> list[LoRARows]:
    """Row parameters of the active adapters: ``lora_B`` weight and bias, and DoRA's magnitude.

    Args:
        layer: A PEFT LoRA layer.
        layer_name: Its qualified name.

    Returns:
        The trainable ones, each with ``out_features`` rows.

    Raises:
        UpdateError: No active adapter of this layer is trainable.
    """
    found: list[LoRARows] = []
    for adapter in active_adapters(layer):
        matrix_b = lora_b(layer, adapter)
        candidates: list[tuple[str, Tensor | None]] = [
            (f"{layer_name}.lora_B.{adapter}.weight", getattr(matrix_b, "weight", None)),
            (f"{layer_name}.lora_B.{adapter}.bias", getattr(matrix_b, "bias", None)),
        ]
        magnitudes = getattr(layer, "lora_magnitude_vector", {})
        if adapter in magnitudes:
            name = f"{layer_name}.lora_magnitude_vector.{adapter}.weight"
            candidates.append((name, magnitudes[adapter].weight))
        for name, parameter in candidates:
            if isinstance(parameter, nn.Parameter) and parameter.requires_grad:
                found.append(LoRARows(name, parameter))
    if not found:
        raise UpdateError(
            f"the LoRA layer {layer_name!r} has no trainable parameter in its active adapter; activate the adapter "
            "that you train (set_adapter) and leave its parameters unfrozen."
        )
    return found


def require_lora(model: nn.Module) -> None:
    """Checks that a model holds LoRA layers.

    Raises:
        DiscoveryError: It holds none.
    """
    if not any(is_lora_layer(module) for module in model.modules()):
        raise DiscoveryError(
            f"{type(model).__name__} holds no LoRA layer; wrap it with peft.get_peft_model(model, LoraConfig(...)) "
            "before NA-LoRA looks for gates."
        )
