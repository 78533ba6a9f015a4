"""What a probe did not reach: parts of a model that can be called by themselves, and gates that stay unknown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from na_lora_lightning.core.discovery.activation_modules import activation_of
from na_lora_lightning.core.discovery.expert_gates import plain_name
from na_lora_lightning.core.discovery.probe_inputs import probe_inputs
from na_lora_lightning.core.lora_layers import is_linear, is_lora_layer, is_on_parameter
from na_lora_lightning.core.model_parts import branch_name, language_model_name
from na_lora_lightning.core.sites import LeftOut

_REASON = (
    "the probe's forward pass did not call it (an expert that no token was sent to, or a part for images or sound)"
)
_REMEDY = "pass example_inputs that reach every part with LoRA"


def parts_to_call(root: nn.Module, called: set[nn.Module]) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """Parts with LoRA that were not called, and what they can be called with by themselves.

    Args:
        root: The model.
        called: Linear layers that were called.
    """
    language_model = language_model_name(root)
    layers = {name: module for name, module in root.named_modules() if is_lora_layer(module)}
    names = {branch_name(root, language_model, name): module in called for name, module in layers.items()}
    for part in dict.fromkeys(name for name in names if name is not None):
        if not any(module in called for name, module in layers.items() if name.startswith(f"{part}.")):
            module = root.get_submodule(part)
            yield from ((module, inputs) for inputs in probe_inputs(module)[:1])


def unreached(root: nn.Module, called: set[nn.Module]) -> list[LeftOut]:
    """Feed-forward blocks with LoRA that the forward pass did not enter, so that their gates are unknown.

    Args:
        root: The model.
        called: Linear layers, and wrappers of stacked experts, that were called.
    """
    found: dict[str, LeftOut] = {}
    language_model = language_model_name(root)
    parts: set[str | None] = {
        branch_name(root, language_model, name)
        for name, module in root.named_modules()
        if is_lora_layer(module) and module not in called
    }
    for name, module in root.named_modules():
        if is_lora_layer(module) and is_on_parameter(module) and not isinstance(module.base_layer, nn.Linear):
            if module not in called:
                experts = plain_name(name)
                found.setdefault(experts, LeftOut(experts, "experts", _REASON, not_supported=True, remedy=_REMEDY))
            continue
        layers = {child: inner for child, inner in module.named_children() if is_linear(inner) or is_lora_layer(inner)}
        # The block was entered; some blocks read a layer's weight without calling it.
        if not layers or any(child in called for child in module.children()):
            continue
        with_lora = [child for child, layer in layers.items() if is_lora_layer(layer)]
        in_part = branch_name(root, language_model, f"{name}.{next(iter(layers))}") in parts - {None}
        if not with_lora and (not in_part or len(layers) < 2):
            continue
        makers = [child for child in layers if not _only_takes(layers, child)]
        seen = len(found)
        for child_name, child in module.named_children():
            if child_name in layers or isinstance(child, _DropoutNd) or any(True for _ in child.children()):
                continue
            activation = activation_of(child)
            if activation is None:
                continue
            full_name = f"{name}.{child_name}" if name else child_name
            producers = tuple(f"{name}.{maker}" if name else maker for maker in makers)
            if set(makers) & set(with_lora):
                entry = LeftOut(full_name, activation.name, _REASON, not_supported=True, remedy=_REMEDY)
            else:
                reason = f"{', '.join(producers)} has no LoRA"
                entry = LeftOut(full_name, activation.name, reason, gate_without_lora=True, producers=producers)
            found.setdefault(full_name, entry)
        widening = [child for child in with_lora if _sizes(layers[child])[0] != _sizes(layers[child])[1]]
        if len(found) == seen and set(widening) & set(makers) and len(makers) < len(layers):
            # Its activation may be a function.
            maker = f"{name}.{next(child for child in makers if child in widening)}"
            found.setdefault(maker, LeftOut(maker, "unknown", _REASON, producers=(maker,)))
    return list(found.values())


def _only_takes(layers: dict[str, nn.Module], name: str) -> bool:
    """Whether a layer of a feed-forward block takes the gated result, told by its sizes."""
    into, out = _sizes(layers[name])
    others = [_sizes(layer) for other, layer in layers.items() if other != name]
    makes = any(other_in in (out, out // 2) for other_in, _ in others)
    takes = any(other_out in (into, 2 * into) for _, other_out in others)
    # Where sizes fit both ways, the layer that was made last takes.
    return takes and (not makes or list(layers)[-1] == name)


def _sizes(layer: nn.Module) -> tuple[int, int]:
    inner: Any = layer.get_base_layer() if is_lora_layer(layer) else layer  # type: ignore[operator]
    if hasattr(inner, "in_features"):
        return int(inner.in_features), int(inner.out_features)
    return int(inner.weight.shape[0]), int(inner.weight.shape[1])
