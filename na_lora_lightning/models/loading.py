"""Loads a Hugging Face causal language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from na_lora_lightning.errors import ConfigurationError, one_line
from na_lora_lightning.models.new_tokens import make_room, token_ids
from na_lora_lightning.models.quantization import loading_options
from na_lora_lightning.models.source import (
    BaseModelSource,
    auto_class,
    gated_remedy,
    load_config,
    require_model,
    resolve_dtype,
    without_progress_bars,
)
from na_lora_lightning.models.targets import mark_transposed_experts
from na_lora_lightning.versions import require_new_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Those of torch.compile.
COMPILE_OPTIONS: dict[str, Any] = {}
_CHECKPOINT = "_gradient_checkpointing_func"


def load_base_model(source: BaseModelSource, device: torch.device | None) -> PreTrainedModel:
    """Loads the base model, from safetensors files only.

    Args:
        source: Which model, and how.
        device: Where it will train, or None if it will not, which leaves the dtype ``"auto"`` as it is stored; the
            weights are loaded to the CPU, or wherever the surrounding context says; quantised ones to the device.

    Returns:
        The model, in evaluation mode and with all its parameters set, and with rows for new tokens.

    Raises:
        ConfigurationError: There is no such model, it lacks weights, or transformers is too old.
    """
    require_new_transformers()
    require_model(source)
    ids = token_ids(source)
    options: dict[str, Any] = {
        "revision": source.revision or "main",
        "trust_remote_code": source.trust_remote_code,
        "dtype": resolve_dtype(source.dtype, device),
        "use_safetensors": True,
    }
    options |= loading_options(source.quantization, device)
    if source.attention_implementation is not None:
        options["attn_implementation"] = source.attention_implementation
    name = source.resolved_name_or_path
    loaded: Any
    try:
        with without_progress_bars():
            loaded = auto_class(load_config(source)).from_pretrained(name, output_loading_info=True, **options)
    except Exception as error:
        # Configurations with values of the wrong kind go wrong wherever a model's code meets them.
        if "gated repo" in str(error):
            raise ConfigurationError(gated_remedy(source.name_or_path)) from error
        if source.quantization.kind is not None:
            raise ConfigurationError(
                f"the model {source.name_or_path!r} cannot be held as {source.quantization.kind} on {device or 'cpu'} "
                f"({one_line(error)}); use another quantization.kind, or none."
            ) from error
        raise ConfigurationError(
            f"the model {source.name_or_path!r} cannot be loaded ({one_line(error)}); give a causal language model, or "
            "one for images and text, with safetensors weights."
        ) from error
    model: PreTrainedModel
    model, loading = loaded
    _require_all_weights(source, loading)
    make_room(model, ids)
    mark_transposed_experts(model)
    return model


def _require_all_weights(source: BaseModelSource, loading: Mapping[str, Any]) -> None:
    # transformers makes up what is missing at random, and LoRA on a random layer trains without an error.
    missing = sorted(loading["missing_keys"])
    mismatched = sorted(str(entry[0]) for entry in loading.get("mismatched_keys", ()))
    if missing or mismatched:
        raise ConfigurationError(
            f"the model {source.name_or_path!r} lacks weights (such as "
            f"{(missing + mismatched)[0]!r}); give a complete checkpoint."
        )


def enable_gradient_checkpointing(model: PreTrainedModel, offload: bool = False) -> None:
    """Has the model recompute its blocks' activations in the backward pass, to save memory.

    Args:
        model: The model.
        offload: Keep what blocks are given, from which they are recomputed, in the memory of the CPU.

    Raises:
        ConfigurationError: The model does not support it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigurationError(
            f"{type(model).__name__} does not support gradient checkpointing; set gradient_checkpointing to false."
        )
    # transformers is renaming the method.
    prefix = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    enable = getattr(model, f"{prefix}_checkpointing_enable")
    enable(**{f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}})
    if offload:
        # Where transformers keeps what it recomputes blocks with.
        blocks = [module for module in model.modules() if hasattr(module, _CHECKPOINT)]
        if not blocks:
            raise ConfigurationError(
                f"{type(model).__name__} does not say where it recomputes activations, so their inputs cannot be kept "
                "on the CPU; set gradient_checkpointing to true."
            )
        for block in blocks:
            setattr(block, _CHECKPOINT, _checkpoint_on_cpu)
    # Without it no input of a checkpointed block requires a gradient, and LoRA inside may silently not train.
    model.enable_input_require_grads()


def _checkpoint_on_cpu(function: Any, *arguments: Any, **options: Any) -> Any:
    # What is computed inside is saved by nothing, so the arguments alone are copied.
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(function, *arguments, use_reentrant=False, **options)


def compile_blocks(model: nn.Module) -> None:
    """Has ``torch.compile`` make graphs of a model's blocks, which equal blocks share.

    Args:
        model: The Hugging Face model, as it is called: with LoRA, and sharded if it is.

    Raises:
        ConfigurationError: It does not say what its blocks are.
    """
    names = tuple(getattr(model, "_no_split_modules", None) or ())
    # fully_shard() puts a word before them.
    blocks = [module for module in model.modules() if type(module).__name__.removeprefix("FSDP") in names]
    if not blocks:
        raise ConfigurationError(f"{type(model).__name__} does not name its blocks; set model.compile to false.")
    for block in blocks:
        block.compile(**COMPILE_OPTIONS)
