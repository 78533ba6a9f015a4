"""The little that the core needs to know about PEFT's LoRA layers.

PEFT is recognised by its attributes and not imported, so that the core stays light and also works on models in
which LoRA layers were injected without a ``PeftModel`` around them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from na_lora_lightning.errors import DiscoveryError, UpdateError

Hook = TypeVar("Hook", bound=Callable[..., Any])


@dataclass(frozen=True)
class LoRARows:
    """A trainable parameter of a LoRA layer whose rows are told apart.

    Attributes:
        name: Qualified name, for messages.
        parameter: ``[out_features, ...]``, or ``[r, in_features]`` for A.
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
    """The module whose weight is B, ``[out_features, r]``; AdaLoRA has none."""
    return layer.lora_B[adapter]  # type: ignore[index, return-value]


def weight_a(layer: nn.Module, adapter: str) -> Tensor:
    """A itself, ``[r, in_features]``: the weight of a module, or with AdaLoRA a parameter."""
    return _weight(layer.lora_A[adapter])  # type: ignore[index]


def weight_b(layer: nn.Module, adapter: str) -> Tensor:
    """B itself, ``[out_features, r]``: the weight of a module, or with AdaLoRA a parameter."""
    return _weight(layer.lora_B[adapter])  # type: ignore[index]


def _weight(matrix: nn.Module | Tensor) -> Tensor:
    if isinstance(matrix, Tensor):
        return matrix
    weight: Tensor = matrix.weight  # type: ignore[assignment]
    return weight


def adds_output_of_b(layer: nn.Module, adapter: str) -> bool:
    """Whether the layer adds s·B·A·x to its base layer's output, B being a module, and does nothing else."""
    variants = getattr(layer, "lora_variant", {})
    return isinstance(layer.lora_B[adapter], nn.Module) and adapter not in variants  # type: ignore[index]


def is_product_of_modules(layer: nn.Module, adapter: str) -> bool:
    """Whether the module B makes what the adapter adds from the output of the module A, rescaled perhaps (DoRA)."""
    return adds_output_of_b(layer, adapter) or adapter in getattr(layer, "lora_magnitude_vector", {})


def scaling(layer: nn.Module, adapter: str) -> float:
    """The factor s in δ = s·B·A·x."""
    return float(layer.scaling[adapter])  # type: ignore[index]


def observing(hook: Hook, when: Callable[[], bool]) -> Hook:
    """Marks a forward hook that changes nothing of what passes.

    A layer that computes several modules in one function passes by their hooks. For hooks that are marked it calls the
    modules once more, and for others it computes as PEFT does.

    Args:
        hook: For ``register_forward_hook``.
        when: Whether it looks at a call.

    Returns:
        The hook.
    """
    hook.observes_when = when  # type: ignore[attr-defined]
    return hook


def only_observed(module: nn.Module) -> bool:
    """Whether nothing but hooks of :func:`observing` would notice if what a module does was done without calling it."""
    return not (
        module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        or (
            module._forward_hooks and any(not hasattr(each, "observes_when") for each in module._forward_hooks.values())
        )
    )


def observed_now(module: nn.Module) -> bool:
    """Whether a hook of :func:`observing` looks at this call of a module."""
    return any(hook.observes_when() for hook in module._forward_hooks.values() if hasattr(hook, "observes_when"))


def trained_a(layer: nn.Module, layer_name: str) -> list[LoRARows]:
    """The matrices A of the active adapters that are trained, each ``[r, in_features]``."""
    matrices = {adapter: weight_a(layer, adapter) for adapter in active_adapters(layer)}
    return [
        LoRARows(f"{layer_name}.lora_A.{adapter}", matrix)
        for adapter, matrix in matrices.items()
        if isinstance(matrix, nn.Parameter) and matrix.requires_grad
    ]


def lora_rows(layer: nn.Module, layer_name: str) -> list[LoRARows]:
    """Row parameters of the active adapters: ``lora_B`` weight and bias, DoRA's magnitude, and a trained base bias.

    Args:
        layer: A PEFT LoRA layer.
        layer_name: Its qualified name.

    Returns:
        The trainable ones, each with ``out_features`` rows.

    Raises:
        UpdateError: No active adapter of this layer is trainable.
    """
    candidates: list[tuple[str, object]] = []
    for adapter in active_adapters(layer):
        name = f"{layer_name}.lora_B.{adapter}"
        candidates.append((f"{name}.weight", weight_b(layer, adapter)))
        candidates.append((f"{name}.bias", getattr(layer.lora_B[adapter], "bias", None)))  # type: ignore[index]
        magnitudes = getattr(layer, "lora_magnitude_vector", {})
        if adapter in magnitudes:
            candidates.append((f"{layer_name}.lora_magnitude_vector.{adapter}.weight", magnitudes[adapter].weight))
    found = [
        LoRARows(name, parameter)
        for name, parameter in candidates
        if isinstance(parameter, nn.Parameter) and parameter.requires_grad
    ]
    if not found:
        raise UpdateError(
            f"the LoRA layer {layer_name!r} has no trainable parameter with a row for each channel (lora_B, its bias, "
            "or DoRA's magnitude) in its active adapter, so there is nothing to mask; activate the adapter that you "
            "train (set_adapter), leave these parameters unfrozen, or train without the NA-LoRA callbacks."
        )
    base = getattr(layer, "base_layer", None)
    bias = getattr(base, "bias", None) if isinstance(base, nn.Module) and is_linear(base) else None
    if isinstance(bias, nn.Parameter) and bias.requires_grad:
        # PEFT's bias="lora_only": it shifts the pre-activation of a channel as the row of B does.
        found.append(LoRARows(f"{layer_name}.base_layer.bias", bias))
    return found


def require_lora(model: nn.Module) -> None:
    """Checks that a model holds LoRA layers.

    Raises:
        DiscoveryError: It holds none, or such that are not trained themselves.
    """
    if "XLORA" in tuners_of(model):
        raise DiscoveryError(
            f"{type(model).__name__} is adapted by XLORA, which mixes LoRA adapters by weights of each token, so that "
            "no row of lora_B makes a channel alone; use peft.LoraConfig, or train without the NA-LoRA callbacks."
        )
    if not any(is_lora_layer(module) for module in model.modules()):
        tuners = tuners_of(model)
        if tuners:
            raise DiscoveryError(
                f"{type(model).__name__} is adapted by {' and '.join(tuners)}, which has no lora_B whose rows make the "
                "channels of a gate; use peft.LoraConfig or AdaLoraConfig, or train without the NA-LoRA callbacks."
            )
        raise DiscoveryError(
            f"{type(model).__name__} holds no LoRA layer; wrap it with peft.get_peft_model(model, LoraConfig(...)) "
            "before NA-LoRA looks for gates."
        )


def tuners_of(model: nn.Module) -> list[str]:
    """What PEFT calls the methods of a ``PeftModel``'s adapters; empty for other modules."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping):
        return []
    return sorted({str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()})
