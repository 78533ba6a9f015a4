"""The only place that names parts of PEFT that it does not document: how it resolves targets, and its kinds of layers.

They are the same from PEFT 0.18 to 0.21; the tests run at both ends.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from peft.tuners.lora import Linear as LoRALinear  # noqa: F401  # for other modules
from torch import nn

from na_lora_lightning.errors import ConfigurationError

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

_TARGETS = "peft.tuners.tuners_utils"
# Since PEFT 0.19: layers of older checkpoints that transformers 5 has as one fused parameter.
_CONVERSION = "peft.utils.transformers_weight_conversion"


def is_refused(model: PreTrainedModel, layer: str) -> bool:
    """Whether PEFT refuses to adapt layers of a name in a model, as some of those with Mamba blocks."""
    from peft import LoraConfig

    try:
        _function(_TARGETS, "_check_lora_target_modules_mamba")(LoraConfig(), model, layer)
    except ValueError:
        return True
    return False


def with_all_linear(config: LoraConfig, model: PreTrainedModel) -> LoraConfig:
    """A copy of a config in which ``all-linear`` is replaced by the names of layers."""
    resolved: LoraConfig = _function(_TARGETS, "_maybe_include_all_linear_layers")(copy.deepcopy(config), model)
    return resolved


def is_target(config: LoraConfig, layer: str) -> bool:
    """Whether a config, without ``all-linear``, targets a layer and does not exclude it."""
    found: bool | re.Match[str] | None = _function(_TARGETS, "check_target_module_exists")(config, layer)
    return found is True


def converted_config(config: LoraConfig, model: PreTrainedModel) -> LoraConfig | None:
    """The config that PEFT would make of one that names layers which are fused in this model.

    Returns:
        A copy with further ``target_parameters``; None where PEFT would leave it alone, as it does before 0.19.
    """
    try:
        import_module(_CONVERSION)
    except ModuleNotFoundError:
        return None
    mapping = _function(_CONVERSION, "get_model_conversion_mapping")(model)
    changed = copy.deepcopy(config)
    _function(_CONVERSION, "convert_peft_config_for_transformers")(changed, model=model, conversions=mapping)
    added = set(changed.target_parameters or ()) - set(config.target_parameters or ())
    return changed if added else None


def is_lora(module: nn.Module) -> bool:
    """Whether a module is a layer, or a parameter, with LoRA."""
    return isinstance(module, _kind("peft.tuners.lora", "LoraLayer"))


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a layer with an adapter of any kind."""
    return isinstance(module, _kind(_TARGETS, "BaseTunerLayer"))


def trains_tokens(module: nn.Module) -> bool:
    """Whether a module is an embedding of which single tokens are trained."""
    return isinstance(module, _kind("peft.tuners.trainable_tokens", "TrainableTokensLayer"))


def is_left_by_merge(module: nn.Module) -> bool:
    """Whether a module is of PEFT, and so none of a base model."""
    return is_adapted(module) or isinstance(module, _kind("peft.utils.other", "AuxiliaryTrainingWrapper"))


def is_plain_dora(layer: nn.Module, adapter: str) -> bool:
    """Whether an adapter of a layer is DoRA and nothing more."""
    variants: Any = getattr(layer, "lora_variant", {})
    return type(variants.get(adapter)) is _kind("peft.tuners.lora.variants", "DoraLinearVariant")


def _kind(module: str, name: str) -> type[nn.Module]:
    kind: type[nn.Module] = _part(module, name, "layers with adapters are told")
    return kind


def _function(module: str, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = _part(module, name, "the targets of LoRA are resolved")
    return function


def _part(module: str, name: str, what_for: str) -> Any:
    """A function or class of PEFT.

    Raises:
        ConfigurationError: This version has none of that name.
    """
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(
            f"peft {version('peft')} has no {module}.{name}, by which {what_for}; install the version that is named in "
            "constraints.txt."
        ) from error
