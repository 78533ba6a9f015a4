"""Weights that several modules share: found by their memory, whatever they are called, and parted before a merge.

An adapter changes what one module computes; merged into a weight that others share, it would change those too. So the
adapted module gets a weight of its own first, and the configuration then says what is still tied.
"""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.peft_internals import is_adapted, is_left_by_merge, trains_tokens

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel


def tied_adapted_weights(model: nn.Module) -> dict[str, str]:
    """Weights that an adapter changes and that another module uses too.

    Args:
        model: A PEFT model, or one with PEFT's layers in it.

    Returns:
        Qualified names of the adapted weights, each with the name of another place that shares its memory.
    """
    return {name: others[0] for name, others, _, _ in _tied(model)}


def untie_adapted_weights(model: nn.Module) -> list[str]:
    """Gives each adapted layer weights of its own where others share them.

    Args:
        model: A PEFT model; changed in place. What it computes stays bitwise the same.

    Returns:
        Qualified names of the weights that were parted.
    """
    parted = []
    for name, others, layer, parameter_name in list(_tied(model)):
        base: nn.Module = layer.get_base_layer()  # type: ignore[operator]
        if any(model.get_submodule(other.rpartition(".")[0]) is base for other in others):
            # The module itself stands in two places, and the other one is to keep its weight.
            shared, base = base, copy.copy(base)
            base._parameters = dict(base._parameters)
            holder = next(m for m in layer.modules() if getattr(m, "base_layer", None) is shared)
            holder.base_layer = base
        weight: Tensor = getattr(base, parameter_name)
        base._parameters[parameter_name] = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        parted.append(name)
    return parted


def require_untiable(model: PeftModel) -> None:
    """Checks that a model whose tied weights are adapted can be stored after a merge.

    Args:
        model: The PEFT model.

    Raises:
        ConfigurationError: The model's class ties them whatever its configuration says, or computes something else
            where they are not tied.
    """
    tied = tied_adapted_weights(model)
    if not tied:
        return
    base: Any = model.get_base_model()
    untied = copy.deepcopy(base.config)
    _untie_in(untied)
    for name, other in tied.items():
        plain = _plain_name(name)
        # A module in two places has no name of its own in what is stored.
        if any(plain in names for names in ties_of_class(type(base), untied)):
            raise ConfigurationError(
                f"LoRA on {plain!r} could not be merged, as {type(base).__name__} always shares its weights with "
                f"{_plain_name(other)!r}; leave it out of lora.target_modules and lora.target_parameters."
            )
    if not _computes_the_same(base, base.config, untied):
        name, other = next(iter(tied.items()))
        raise ConfigurationError(
            f"LoRA on {_plain_name(name)!r} could not be merged, as {type(base).__name__} computes something else "
            f"where its weights are not those of {_plain_name(other)!r}; leave it out of lora.target_modules and "
            "lora.target_parameters."
        )


def unmerged(model: nn.Module) -> str | None:
    """The name of a layer in which a merge left something of an adapter, as where one wraps another; None if none."""
    return next((name for name, module in model.named_modules() if is_left_by_merge(module)), None)


def has_ties(model: nn.Module) -> bool:
    """Whether any two parameters of a model share memory."""
    names: dict[int, int] = defaultdict(int)
    for _, parameter in model.named_parameters(remove_duplicate=False):
        names[_memory(parameter)] += 1
    return any(count > 1 for count in names.values())


def match_config(model: PreTrainedModel) -> bool:
    """Makes the configuration of a merged model say what is tied in it, so that it loads as it is.

    Args:
        model: A model without adapters, with the configuration that it had before; changed in place.

    Returns:
        Whether the configuration had to be changed. What it tied and is the same still is then stored twice.

    Raises:
        ConfigurationError: There is no configuration with which the model would load as it is.
    """
    contradiction = _first_contradiction(model)
    if contradiction is None:
        return False
    tied = copy.deepcopy(model.config)
    _untie_in(model.config)
    left = _first_contradiction(model)
    if left is not None or not _computes_the_same(model, tied, model.config):
        first, second = left or contradiction
        raise ConfigurationError(
            f"the merged model cannot be stored, as {type(model).__name__} shares the weights of {first!r} and "
            f"{second!r}, and the adapter changes one of them alone; use the adapter as it is."
        )
    for module in model.modules():
        # transformers reads from there, too, what it need not store twice.
        if hasattr(module, "all_tied_weights_keys"):
            module.all_tied_weights_keys = {}  # type: ignore[assignment]
    _part(model)
    return True


def ties_of_class(kind: type[PreTrainedModel], config: PreTrainedConfig) -> list[set[str]]:
    """The names that share one parameter in a model freshly made from a configuration, group by group."""
    with torch.device("meta"):
        model = kind._from_config(copy.deepcopy(config))
    model.tie_weights()
    groups: dict[int, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].add(name)
    return [names for names in groups.values() if len(names) > 1]


def _tied(model: nn.Module) -> Iterator[tuple[str, list[str], nn.Module, str]]:
    """Adapted weights with the other names of their memory, the layer that adapts them, and their name in its base."""
    by_memory: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_memory[_memory(parameter)].append((name, parameter))
    names_of: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names_of[module].append(name)
    seen = set()
    for layer, names in names_of.items():
        # Trained tokens reach every place that shares the embedding, by PEFT's own doing.
        if not is_adapted(layer) or trains_tokens(layer):
            continue
        prefixes = tuple(f"{name}." for name in names)
        base: nn.Module = layer.get_base_layer()  # type: ignore[operator]
        for parameter_name, weight in base.named_parameters(recurse=False):
            sharing = [(n, p) for n, p in by_memory[_memory(weight)] if _overlap(weight, p)]
            own = [name for name, _ in sharing if name.startswith(prefixes)]
            others = [name for name, _ in sharing if not name.startswith(prefixes)]
            if others and own and own[0] not in seen:
                seen.add(own[0])
                yield own[0], others, layer, parameter_name


def _memory(tensor: Tensor) -> int:
    # Unlike a pointer to the data it also tells tensors on the meta device apart.
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)


def _overlap(first: Tensor, second: Tensor) -> bool:
    def ends(tensor: Tensor) -> tuple[int, int]:
        extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        begin = int(tensor.storage_offset()) * tensor.element_size()
        return begin, begin + int(extent) * tensor.element_size()

    if first is second:
        return True
    if not first.numel() or not second.numel() or first.layout != torch.strided or second.layout != torch.strided:
        return False
    (begin, end), (other_begin, other_end) = ends(first), ends(second)
    return begin < other_end and other_begin < end


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _untie_in(config: PreTrainedConfig) -> None:
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            _untie_in(part)


def _first_contradiction(model: PreTrainedModel) -> tuple[str, str] | None:
    """Two names that would be one parameter in a loaded model, and are different ones in this."""
    for names in ties_of_class(type(model), model.config):
        first, *rest = sorted(names)
        weight = model.get_parameter(first)
        for other in rest:
            second = model.get_parameter(other)
            if second is not weight and (second.shape != weight.shape or not torch.equal(second, weight)):
                return first, other
    return None


def _part(model: PreTrainedModel) -> None:
    """Gives what shares memory parameters of its own, unless the model's class ties it."""
    still_tied = [frozenset(names) for names in ties_of_class(type(model), model.config)]
    seen: dict[int, set[str]] = defaultdict(set)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        former = seen[id(parameter)]
        if former and not any(name in names and names & former for names in still_tied):
            owner = model.get_submodule(name.rpartition(".")[0])
            copied = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            owner._parameters[name.rpartition(".")[2]] = copied
            continue
        former.add(name)


def _computes_the_same(model: nn.Module, config: PreTrainedConfig, untied: PreTrainedConfig) -> bool:
    """Whether nothing but the weights depends on what the configuration says of ties.

    T5 and UDOP scale what their output head is given if it is tied, one by an option that it derives on loading.
    """
    for kind in {type(module) for module in model.modules()}:
        if "tie_word_embeddings" in inspect.getsource(kind.forward):
            return False
    first, second = (_without_ties(type(c).from_dict(c.to_dict()).to_dict()) for c in (config, untied))
    return bool(first == second)


def _without_ties(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {name: _without_ties(value) for name, value in values.items() if name != "tie_word_embeddings"}
