"""Turns what a user wants adapted into targets for which PEFT adapts exactly that.

For models whose experts transformers keeps in stacked parameters, PEFT replaces the names of layers (``gate_proj``,
``all-linear``) by the names of those parameters, and the dense layers of the same names get no LoRA. The targets
made here say it parameter by parameter instead, in a form that survives that replacement, also when plain ``peft``
loads the adapter.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from na_lora_lightning.core.experts import expert_owners, stacked_parameters
from na_lora_lightning.core.model_parts import Part, branch_name, is_multimodal, language_model_name, part_of
from na_lora_lightning.peft_internals import converted_config, is_refused, is_target, with_all_linear

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

ALL_EXPERTS = "all-experts"
ALL_LINEAR = "all-linear"
_ALL_PARTS: tuple[Part, ...] = ("language", "vision", "projector")


@dataclass(frozen=True)
class LoRATargets:
    """Targets for ``peft.LoraConfig``.

    Attributes:
        target_modules: Names of layers, or a regular expression, or ``"all-linear"``.
        target_parameters: Names of parameters.
        exclude_modules: Names of layers to leave out, or a regular expression.
    """

    target_modules: list[str] | str | None
    target_parameters: list[str] | None
    exclude_modules: list[str] | str | None = None


def lora_targets(
    model: PreTrainedModel,
    target_modules: list[str] | str | None = ALL_LINEAR,
    target_parameters: list[str] | str | None = None,
    exclude_modules: list[str] | str | None = None,
    layers_to_transform: list[int] | None = None,
    parts: Collection[Part] = _ALL_PARTS,
) -> LoRATargets:
    """Makes targets under which every layer that is meant gets LoRA.

    Args:
        model: The base model, before PEFT wraps it. Experts that it stores as ``[experts, in, out]`` without saying
            so are marked, so that PEFT reads them the right way round.
        target_modules: As ``peft.LoraConfig`` takes them.
        target_parameters: As ``peft.LoraConfig`` takes them, or ``"all-experts"`` for all stacked experts.
        exclude_modules: As ``peft.LoraConfig`` takes them.
        layers_to_transform: As ``peft.LoraConfig`` takes them; it does not apply to parameters.
        parts: Parts of a multimodal model whose layers may be adapted.

    Returns:
        Targets to be put into a ``peft.LoraConfig``.

    Raises:
        ValueError: PEFT cannot replace the names of layers, because they name one half of a fused parameter.
    """
    from peft import LoraConfig

    mark_transposed_experts(model)
    wants_experts = target_parameters == ALL_EXPERTS
    parameters = expert_parameters(model, parts) if wants_experts else list(target_parameters or ())
    if target_modules == ALL_LINEAR:
        exclude_modules = _without_incompatible(model, exclude_modules)
    exclude_modules = _without_other_parts(model, exclude_modules, parts)
    config = LoraConfig(
        target_modules=copy.copy(target_modules),
        target_parameters=parameters,
        exclude_modules=exclude_modules,
        layers_to_transform=layers_to_transform if target_modules != ALL_LINEAR else None,
    )
    converted = converted_config(config, model)
    if converted is None:
        if target_modules == ALL_LINEAR and layers_to_transform is not None:
            # PEFT takes numbers of layers beside names alone.
            every = [name for name, _ in model.named_modules()]
            target_modules = _short_names(_matched_layers(model, config), every, least=1)
        return LoRATargets(target_modules, parameters or None, exclude_modules)
    wanted, matched = _matched_layers(model, config), _matched_layers(model, converted)
    lost = sorted(wanted - matched)
    # PEFT makes the last parts of names its targets, and a layer "0" is then also every first block.
    kept = _short_names(wanted & matched, [name for name, _ in model.named_modules()], least=1)
    # The names that PEFT makes of layers are short enough to hit unrelated parameters of the same name.
    dense = _short_names([f"{name}.weight" for name in lost], [name for name, _ in model.named_parameters()])
    replaced = set(converted.target_parameters or ())
    if target_modules == ALL_LINEAR:
        # Routers are not linear layers in any other model either.
        replaced = {name for name in replaced if not name.endswith("gate.weight")}
    names = {*replaced, *dense}
    needed = {name for name in names if not any(name.endswith(f".{other}") for other in names)}
    return LoRATargets(kept or None, sorted(needed), exclude_modules)


def expert_parameters(model: nn.Module, parts: Collection[Part] = _ALL_PARTS) -> list[str]:
    """Short names of the parameters that hold stacked experts, as PEFT's ``target_parameters`` takes them.

    Args:
        model: The base model.
        parts: Parts of a multimodal model whose experts are wanted.
    """
    language_model = language_model_name(model)
    names = [
        f"{owner}.{name}"
        for owner, module, _ in expert_owners(model)
        for name in stacked_parameters(module)
        if part_of(model, language_model, owner) in parts
    ]
    return _short_names(names, [name for name, _ in model.named_parameters()])


def names_experts(model: PreTrainedModel, name: str) -> bool:
    """Whether PEFT takes the name of a layer for parameters, as the model keeps such layers stacked in those."""
    from peft import LoraConfig

    try:
        return converted_config(LoraConfig(target_modules=[name]), model) is not None
    except ValueError:
        # One of two that are fused, which is said when all names are known.
        return True


def mark_transposed_experts(model: PreTrainedModel) -> None:
    """Tells PEFT which stacked experts are stored as ``[experts, in, out]``, where the model does not.

    PEFT reads the attribute ``is_transposed`` and takes ``[experts, out, in]`` where there is none, as in Llama 4.

    Args:
        model: The base model.
    """
    config = model.config.get_text_config()
    hidden_size = getattr(config, "hidden_size", None)
    for _, owner, _ in expert_owners(model):
        if hasattr(owner, "is_transposed"):
            continue
        first, *_ = stacked_parameters(owner).values()
        last = list(stacked_parameters(owner).values())[-1]
        # The first parameter takes hidden states and the last makes them; one of the two tells in from out.
        into, out_of = first.shape[1:], last.shape[1:]
        if into[0] == hidden_size != into[1] or out_of[1] == hidden_size != out_of[0]:
            owner.is_transposed = True  # type: ignore[assignment]


def _without_incompatible(model: PreTrainedModel, exclude: list[str] | str | None) -> list[str] | str | None:
    """Also leaves out what ``all-linear`` names and PEFT cannot adapt.

    These are layers that it refuses in models with Mamba blocks, a model's own kinds of linear layer that do something
    else, such as Llama 4's router, and the insides of PyTorch's own attention.
    """
    refused: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            # PyTorch reads the weights of its layers and does not call them.
            refused.update(f"{name}.{inner}" for inner, _ in module.named_modules() if inner)
        if isinstance(module, nn.Linear):
            if not _is_linear_map(module):
                refused.add(name)
            if is_refused(model, name.rpartition(".")[2]):
                refused.add(name.rpartition(".")[2])
    if not refused:
        return exclude
    if isinstance(exclude, str):
        return f"(?:{exclude})|(?:.*\\.)?(?:{'|'.join(map(re.escape, sorted(refused)))})"
    return [*(exclude or ()), *sorted(refused)]


def _without_other_parts(
    model: PreTrainedModel, exclude: list[str] | str | None, parts: Collection[Part]
) -> list[str] | str | None:
    """Also leaves out the layers of all parts of a multimodal model but the given ones."""
    if not is_multimodal(model):
        return exclude
    language_model = language_model_name(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    others = {name for name in linear if part_of(model, language_model, name) not in parts}
    if not others:
        return exclude
    branches = {name: branch_name(model, language_model, name) for name in linear}
    split = {branches[name] for name in linear if name not in others}
    # A part that is left out as a whole is said by its name, and of another one its layers.
    units = {branch if (branch := branches[name]) and branch not in split else name for name in others}
    expression = f"(?:{'|'.join(map(re.escape, sorted(units)))})(?:\\..*)?"
    if exclude is None:
        return expression
    own = exclude if isinstance(exclude, str) else f"(?:.*\\.)?(?:{'|'.join(map(re.escape, exclude))})"
    return f"(?:{own})|{expression}"


def _is_linear_map(module: nn.Linear) -> bool:
    """Whether a layer's output has one value per output feature, as LoRA's has that is added to it."""
    if type(module).forward is nn.Linear.forward or not type(module).__module__.startswith("transformers.models."):
        return True
    inputs = torch.zeros(1, 2, module.in_features, device=module.weight.device, dtype=module.weight.dtype)
    try:
        with torch.no_grad():
            output = module(inputs)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, 2, module.out_features)


def _matched_layers(model: PreTrainedModel, config: LoraConfig) -> set[str]:
    """Names of the linear layers that a config targets."""
    from transformers.pytorch_utils import Conv1D

    resolved = with_all_linear(config, model)
    if not resolved.target_modules:
        return set()
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and is_target(resolved, name)
    }


def _short_names(names: Collection[str], all_names: Iterable[str], least: int = 2) -> list[str]:
    """Endings of names, of ``least`` parts or more, that together match these names and no others."""
    wanted, others = set(names), set(all_names) - set(names)
    short: set[str] = set()
    for name in wanted:
        parts = name.split(".")
        endings = [".".join(parts[-length:]) for length in range(least, len(parts) + 1)]
        short.add(
            next((e for e in endings if not any(other == e or other.endswith(f".{e}") for other in others)), name)
        )
    return sorted(short)
