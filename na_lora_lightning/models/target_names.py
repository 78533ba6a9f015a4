"""Every name in the LoRA options stands for something in the model: a misspelt one trains nothing, and in silence."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from na_lora_lightning.arguments import LoRAOptions
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.models.targets import ALL_EXPERTS, ALL_LINEAR, names_experts
from na_lora_lightning.peft_internals import is_lora

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_SHOWN = 6
# The first number in a name, as PEFT counts layers.
_INDEX = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")
_WORD = re.compile(r"(?<!\\)[A-Za-z_][A-Za-z0-9_]{2,}")


class UnmatchedNameWarning(UserWarning):
    """A regular expression for targets has a word that no layer's name has."""


def require_names_of_model(model: PreTrainedModel, lora: LoRAOptions) -> None:
    """Checks that each name in the options is one of the model's.

    Args:
        model: The base model, without LoRA.
        lora: The options.

    Raises:
        ConfigurationError: A name matches nothing, or what LoRA cannot be added to; names the first, and the nearest
            right ones.
    """
    modules = dict(model.named_modules())
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, option):
            _compiled(option, pattern)
    _require_targets(model, modules, lora)
    for name in [] if isinstance(lora.exclude_modules, str) else lora.exclude_modules or ():
        if not any(_ends_with(other, name) for other in modules):
            raise _unknown("exclude_modules", name, modules)
    if isinstance(lora.exclude_modules, str):
        _require_expression("exclude_modules", lora.exclude_modules, modules)
    for name in lora.modules_to_save or ():
        # PEFT looks for it within the last part, too.
        if not any(other.endswith(name) for other in modules):
            raise _unknown("modules_to_save", name, modules)
    if not isinstance(lora.target_parameters, str):
        parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        for name in lora.target_parameters or ():
            if not any(_ends_with(other, name) for other in parameters):
                raise _unknown("target_parameters", name, parameters, "parameter", keep=2)


def require_names_in_use(model: PeftModel, lora: LoRAOptions) -> None:
    """Checks that each name in the options had an effect on the LoRA that was added.

    Args:
        model: The model with LoRA.
        lora: The options.

    Raises:
        ConfigurationError: One had none; names the first.
    """
    base: Any = model.get_base_model()
    adapted = _adapted(base)
    if isinstance(lora.target_modules, list):
        for name in lora.target_modules:
            if not any(_ends_with(other, name) for other in adapted) and not names_experts(base, name):
                others = [
                    option
                    for option, is_set in (
                        ("exclude_modules", lora.exclude_modules),
                        ("modules_to_save", lora.modules_to_save),
                        ("layers_to_transform", lora.layers_to_transform is not None),
                        ("parts", True),
                    )
                    if is_set
                ]
                raise ConfigurationError(
                    f"lora.target_modules has {name!r}, of which other options leave nothing "
                    f"({', '.join(f'lora.{option}' for option in others)}); leave it out, or change those."
                )
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, option):
            matches = _compiled(option, rf"(.*\.)?({pattern})$").match
            if not any(map(matches, adapted)):
                raise _unknown(option, pattern, adapted, "layer with LoRA")
    found = {int(match["index"]) for name in adapted if (match := _INDEX.match(f"x.{name}."))}
    for index in lora.layers_to_transform or ():
        if index not in found:
            raise ConfigurationError(
                f"lora.layers_to_transform has {index}, and no layer of that number has a target; the model's blocks "
                f"are numbered from 0 to {_last_block(base)}."
            )


def _require_targets(model: PreTrainedModel, modules: dict[str, nn.Module], lora: LoRAOptions) -> None:
    if isinstance(lora.target_modules, str):
        if lora.target_modules and lora.target_modules != ALL_LINEAR:
            _require_expression("target_modules", lora.target_modules, modules)
        return
    left_out = _matcher("exclude_modules", lora.exclude_modules)
    for name in lora.target_modules:
        if name in (ALL_LINEAR, ALL_EXPERTS):
            option = "target_modules" if name == ALL_LINEAR else "target_parameters"
            raise ConfigurationError(
                f"lora.target_modules has {name!r} in a list; set lora.{option} to that word alone."
            )
        hits = {other: module for other, module in modules.items() if _ends_with(other, name)}
        if not hits and not names_experts(model, name):
            raise _unknown("target_modules", name, [n for n, module in modules.items() if _takes_lora(module)])
        for other, module in hits.items():
            if not _takes_lora(module) and not left_out(other):
                inside = {n.rpartition(".")[2]: None for n, inner in module.named_modules() if _takes_lora(inner)}
                remedy = f"name layers inside it ({_some(inside)})" if inside else "name linear layers"
                raise ConfigurationError(
                    f"lora.target_modules has {name!r}, which is {other!r}, a {type(module).__name__}, to which LoRA "
                    f"cannot be added; {remedy}."
                )


def _require_expression(option: str, expression: str, modules: dict[str, nn.Module]) -> None:
    compiled = _compiled(option, expression)
    if not any(name and compiled.fullmatch(name) for name in modules):
        names = [name.strip() for name in expression.split(",")]
        if all(any(_ends_with(other, name) for other in modules) for name in names):
            remedy = f"names are given in a list: [{', '.join(names)}]"
        else:
            example = next((name for name, module in modules.items() if isinstance(module, nn.Linear)), "lm_head")
            remedy = f"correct it, where names are such as {example!r}, or give a list of names"
        raise ConfigurationError(
            f"lora.{option} is {expression!r}, a regular expression that no layer's whole name matches; {remedy}."
        )
    missing = [word for word in _WORD.findall(expression) if not any(word in name for name in modules)]
    if missing and "(?!" not in expression and "(?<!" not in expression:
        rank_zero_warn(
            f"lora.{option} is {expression!r}, and no layer's name has {missing[0]!r}; correct it if it is misspelt.",
            category=UnmatchedNameWarning,
        )


def _matcher(option: str, names: list[str] | str | None) -> Callable[[str], bool]:
    if isinstance(names, str):
        compiled = _compiled(option, names)
        return lambda other: compiled.fullmatch(other) is not None
    return lambda other: any(_ends_with(other, name) for name in names or ())


def _compiled(option: str, expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ConfigurationError(
            f"lora.{option} has {expression!r}, which is not a valid regular expression ({error}); correct it."
        ) from error


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _takes_lora(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    # Layers of quantised weights are of their makers' kinds, and PEFT knows those.
    return isinstance(module, kinds) or hasattr(module, "in_features")


def _adapted(base: nn.Module) -> list[str]:
    """Names of the layers with LoRA, and of the parameters in the place of the layers that hold them."""
    names = []
    for name, module in base.named_modules():
        if is_lora(module):
            plain = name.replace(".base_layer", "")
            names.append(plain)
            if hasattr(module, "parameter_name"):
                names.append(f"{plain}.{module.parameter_name}")
    return names


def _last_block(base: PreTrainedModel) -> int:
    config: Any = base.config.get_text_config()
    return int(getattr(config, "num_hidden_layers", 1)) - 1


def _unknown(option: str, name: str, names: Iterable[str], what: str = "layer", keep: int = 1) -> ConfigurationError:
    endings = dict.fromkeys(".".join(other.split(".")[-keep:]) for other in names if other)
    near = get_close_matches(name, endings, n=2, cutoff=0.6)
    remedy = f"did you mean {' or '.join(map(repr, near))}?" if near else f"its {what}s are {_some(endings)}."
    return ConfigurationError(f"lora.{option} has {name!r}, and the model has no such {what}; {remedy}")


def _some(names: Iterable[str]) -> str:
    known = [name for name in names if not name.isdigit()]
    return ", ".join(known[:_SHOWN]) + (", ..." if len(known) > _SHOWN else "")
