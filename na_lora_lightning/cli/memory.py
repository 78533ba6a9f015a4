"""The memory of a training step, for ``na-lora inspect``: of which step, on which device, and with which images."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch

from na_lora_lightning.arguments import LogitsOption, LoRAOptions
from na_lora_lightning.cli.errors import read_yaml
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.models.quantization import stored_quantization
from na_lora_lightning.models.source import DUAL_ENCODERS, BaseModelSource, Dtype, load_config, resolve_dtype
from na_lora_lightning.modules.memory import MemoryEstimate, batch_of_size, estimate_memory

# That of the data module.
_LENGTH = 1024


@dataclass(frozen=True)
class StepSize:
    """What of a training step decides how much memory it takes.

    Args:
        batch_size: Number of records in a batch.
        length: Tokens of the longest record; None stands for 1024, or as many as the model takes.
        dtype: Of the base weights; "auto" is the model's own where there is a GPU and float32 elsewhere.
        gradient_checkpointing: Whether activations are recomputed in the backward pass.
        logits: Which logits are held at once, as in fit's model.loss.logits.
    """

    batch_size: int = 8
    length: int | None = None
    dtype: Dtype = "auto"
    gradient_checkpointing: bool | Literal["offload"] = False
    logits: LogitsOption = "auto"

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("length", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigurationError(f"{name} is {value}; set it to at least {least}.")


def estimate_step(
    source: BaseModelSource, lora: LoRAOptions, step: StepSize, quantization: str | None = None
) -> tuple[str, MemoryEstimate | None]:
    """Estimates the memory of a training step.

    Args:
        source: Which model.
        lora: What is trained.
        step: Its size.
        quantization: In what form a fit would hold the base weights; they may be stored so already.

    Returns:
        What is to be told of it, in one sentence; and the estimate, where there is one.
    """
    config = load_config(source)
    if config.model_type in DUAL_ENCODERS:
        return "The memory of a training step is estimated for language models alone.", None
    text = config.get_text_config()
    length = step.length or min(_LENGTH, getattr(text, "max_position_embeddings", None) or _LENGTH)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = resolve_dtype(step.dtype, torch.device(device))
    if not isinstance(dtype, torch.dtype):
        dtype = getattr(config, "dtype", None) or getattr(text, "dtype", None) or torch.float32
    example, images = None, ""
    if getattr(config, "vision_config", None) is not None:
        with suppress(ConfigurationError):
            example = example_of_model(source)
        images = ", without images" if example is None else " with an image each"
    batch = batch_of_size(step.batch_size, length, example)
    quantization = quantization or stored_quantization(config)
    form = str(dtype).removeprefix("torch.") + (f" and {quantization}" if quantization else "")
    place = "a GPU" if device == "cuda" else "a CPU"
    what = f"{step.batch_size} × {batch['input_ids'].shape[1]} tokens{images}, in {form} on {place}"
    try:
        estimate = estimate_memory(
            source,
            lora,
            batch,
            dtype=dtype,
            logits=step.logits,
            gradient_checkpointing=step.gradient_checkpointing,
            device=device,
            quantized=quantization,
        )
    except ConfigurationError as error:
        reason = str(error)
        return reason[:1].upper() + reason[1:], None
    return f"A training step with {what}, takes about {estimate}.", estimate


def options_of_run(file: str) -> dict[str, Any]:
    """What the configuration of a run says of the options of ``na-lora inspect``, by their names.

    Args:
        file: The configuration that ``na-lora fit`` takes.

    Raises:
        ConfigurationError: It is no such file.
    """
    content = read_yaml(file)
    content = content.get("fit", content) if isinstance(content, Mapping) else None
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise ConfigurationError(f"the file {file!r} is not the configuration of a run with a model; correct --config.")
    model, data = _group(content, "model"), _group(content, "data")
    data, loss = _group(data, "init_args") or data, _group(model, "loss")
    named = {
        "model": model.get("model_name_or_path"),
        "trust_remote_code": model.get("trust_remote_code"),
        "new_tokens": model.get("new_tokens"),
        "dtype": model.get("dtype"),
        "gradient_checkpointing": model.get("gradient_checkpointing"),
        "quantization": _group(model, "quantization").get("kind"),
        "logits": loss.get("logits"),
        "batch_size": data.get("batch_size"),
        "length": data.get("max_length"),
        **{f"lora.{name}": value for name, value in _group(model, "lora").items()},
    }
    return {name: value for name, value in named.items() if value is not None}


def _group(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    group = content.get(name)
    return group if isinstance(group, Mapping) else {}


def example_of_model(source: BaseModelSource) -> dict[str, Any]:
    """Has a model's processor make inputs of one image and a few words.

    Raises:
        ConfigurationError: There is no processor, or it lacks something.
    """
    from na_lora_lightning.data.images.batching import example_of_processor
    from na_lora_lightning.data.processors import load_processor

    processor = load_processor(
        source.resolved_name_or_path, revision=source.revision, trust_remote_code=source.trust_remote_code
    )
    return dict(example_of_processor(processor))
