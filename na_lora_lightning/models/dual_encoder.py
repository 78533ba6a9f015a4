"""Dual encoders of images and texts: loading, LoRA on their parts, prompts and class scores."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from na_lora_lightning.arguments import LoRAOptions
from na_lora_lightning.core.model_parts import Part
from na_lora_lightning.errors import ConfigurationError, one_line
from na_lora_lightning.models.loading import load_base_model
from na_lora_lightning.models.lora import add_lora
from na_lora_lightning.models.source import DUAL_ENCODERS, BaseModelSource, load_config, require_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EncoderPart = Literal["text", "vision", "projection"]

_PARTS: dict[EncoderPart, Part] = {"text": "language", "vision": "vision", "projection": "projector"}
# Of text encoders before transformers 4.31, which take the token of the largest number for the end.
_LEGACY_END = 2
_EXAMPLE_PATCHES = (2, 2)
_EXAMPLE_TOKENS = 8


def lora_parts(parts: Collection[EncoderPart], lora: LoRAOptions) -> LoRAOptions:
    """Puts the parts of a dual encoder into the options of LoRA.

    Args:
        parts: The parts to adapt.
        lora: Options that leave ``parts`` at its default.

    Raises:
        ConfigurationError: There is no such part, ``lora.parts`` is set to something else, or LoRA is to begin with
            what a quantisation lost.
    """
    if lora.init_lora_weights == "loftq":
        raise ConfigurationError(
            "lora.init_lora_weights='loftq' begins with what four bits lost of the base, and dual encoders are not "
            "quantised here; use 'orthogonal' or true."
        )
    if not parts or any(part not in _PARTS for part in parts):
        raise ConfigurationError(
            f"parts={list(parts)!r} names no part, or an unknown one; use 'text', 'vision' and 'projection'."
        )
    own = [_PARTS[part] for part in _PARTS if part in parts]
    if lora.parts not in (LoRAOptions().parts, own):
        raise ConfigurationError(
            f"lora.parts={lora.parts!r} is for models with a language model; leave it out and set parts."
        )
    return replace(lora, parts=own)  # type: ignore[arg-type]


def load_dual_encoder(source: BaseModelSource, device: torch.device) -> PreTrainedModel:
    """Loads a dual encoder, from safetensors files only.

    Args:
        source: Which model, and how.
        device: Where it will train.

    Returns:
        The model, in evaluation mode and with all its parameters set.

    Raises:
        ConfigurationError: There is no such model, it is of another kind, or it lacks weights.
    """
    require_model(source)
    try:
        model_type = load_config(source).model_type
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ConfigurationError(
            f"the model {source.name_or_path!r} cannot be loaded ({one_line(error)}); give a dual encoder."
        ) from error
    _require_dual_encoder(source.name_or_path, model_type)
    return load_base_model(source, device)


def _require_dual_encoder(name: str, model_type: str) -> None:
    if model_type not in DUAL_ENCODERS:
        raise ConfigurationError(
            f"the model {name!r} is of type {model_type!r}, which is not a dual encoder of images and texts; give one "
            f"of type {', '.join(DUAL_ENCODERS[:-1])} or {DUAL_ENCODERS[-1]}, or use NALoRALightningModule."
        )


def add_lora_to_encoders(model: PreTrainedModel, lora: LoRAOptions, source: BaseModelSource) -> PeftModel:
    """Wraps a dual encoder with LoRA, whose initial weights depend on the seed of ``seed_everything`` alone.

    Args:
        model: The base model; its parameters are frozen.
        lora: Which layers, and what kind of LoRA.
        source: Where ``model`` came from, to be named in the adapter.

    Returns:
        The PEFT model in training mode, its LoRA parameters in float32.

    Raises:
        ConfigurationError: The options do not fit the model.
    """
    if lora.target_parameters:
        raise ConfigurationError("lora.target_parameters is for experts, and dual encoders have none; leave it out.")
    if lora.init_lora_weights == "eva":
        raise ConfigurationError(
            "lora.init_lora_weights='eva' looks at tokens of a language model, and this model has two encoders; use "
            "'orthogonal' or true."
        )
    return add_lora(model, lora, source)


def class_prompts(class_names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Puts each class into each template; the prompts of a class follow one another.

    Args:
        class_names: Names; an underscore stands for a space.
        templates: Texts with ``{}`` for the name.

    Raises:
        ConfigurationError: There is no template, or one has no place for the name.
    """
    without = [template for template in templates if "{}" not in template]
    if without or not templates:
        what = f"the template {without[0]!r} has no '{{}}'" if without else "templates is empty"
        raise ConfigurationError(
            f"{what}, so prompts would be alike for all classes; use 'a photo of a {{}}.', for example."
        )
    return [template.replace("{}", name.replace("_", " ")) for name in class_names for template in templates]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, config: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Tokenises prompts as the text encoder was trained.

    CLIP reads a text off its end token and is given the mask of the padding behind. SigLIP was trained on texts of
    full length, reads them off the last token and attends to padding as to words, so it is given no mask, and all of
    its tokens count in the statistics of gates.

    Args:
        tokenizer: Of the model.
        config: The model's configuration.
        prompts: The texts.

    Returns:
        ``input_ids`` ``[prompts, length]`` int64, and for CLIP ``attention_mask`` of the same shape.

    Raises:
        ConfigurationError: A prompt is too long, or the tokenizer does not mark its end as the model expects.
    """
    longest = int(config.text_config.max_position_embeddings)
    texts = list(prompts)
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    if max(lengths) > longest:
        text = texts[lengths.index(max(lengths))]
        raise ConfigurationError(
            f"the prompt {text!r} has {max(lengths)} tokens, and the text encoder takes {longest}; shorten the class "
            "name or the template."
        )
    if config.model_type != "clip":
        full = tokenizer(texts, padding="max_length", max_length=longest, return_tensors="pt")
        return {"input_ids": full["input_ids"]}
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    end = config.text_config.eos_token_id
    last = ids.gather(1, mask.sum(dim=1, keepdim=True) - 1)
    if bool((last != (ids.amax(dim=1, keepdim=True) if end == _LEGACY_END else end)).any()):
        raise ConfigurationError(
            f"the tokenizer ends prompts in the token {int(last[0, 0])}, and the text encoder reads them off another "
            "(text_config.eos_token_id); give the folder of a model with its own tokenizer."
        )
    return {"input_ids": ids, "attention_mask": mask}


def average_templates(text_features: Tensor, templates: int) -> Tensor:
    """Mean over the templates of each class, of length one again.

    Args:
        text_features: ``[classes·templates, features]``, each of length one.
        templates: Number of templates.

    Returns:
        ``[classes, features]``, float32.
    """
    features = text_features.float()
    if templates == 1:
        return features
    return functional.normalize(features.unflatten(0, (-1, templates)).mean(dim=1), dim=-1)


def class_logits(model: Any, image_features: Tensor, class_features: Tensor) -> Tensor:
    """Scores of images for classes, with the scale and bias of the model.

    Args:
        model: The base model.
        image_features: ``[images, features]``, each of length one.
        class_features: ``[classes, features]``, each of length one.

    Returns:
        ``[images, classes]``, float32, whatever precision the encoders run in.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        logits = image_features.float() @ class_features.float().t() * model.logit_scale.float().exp()
        bias = getattr(model, "logit_bias", None)
        return logits if bias is None else logits + bias.float()


def trains_texts(model: nn.Module) -> bool:
    """Whether anything that makes text features trains."""
    return any(parameter.requires_grad and "text_" in name for name, parameter in model.named_parameters())


def example_inputs(config: Any, prompts: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Keyword arguments of one small forward pass through both encoders: two prompts and an image of noise.

    Args:
        config: The model's configuration.
        prompts: What :func:`encode_prompts` returned; None stands for some tokens.
    """
    vision = config.vision_config
    generator = torch.Generator().manual_seed(0)
    if prompts is None:
        longest, end = config.text_config.max_position_embeddings, config.text_config.eos_token_id
        tokens = torch.arange(longest if config.model_type != "clip" else min(_EXAMPLE_TOKENS, longest))
        tokens = tokens.remainder(config.text_config.vocab_size)
        if end is not None and end != _LEGACY_END:
            tokens[-1] = end
        prompts = {"input_ids": tokens[None]}
    few = {name: value[:2] for name, value in prompts.items()}
    if config.model_type != "siglip2":
        size = vision.image_size
        return {**few, "pixel_values": torch.randn(1, vision.num_channels, size, size, generator=generator)}
    rows, columns = _EXAMPLE_PATCHES
    values = vision.num_channels * vision.patch_size**2
    return {
        **few,
        "pixel_values": torch.randn(1, rows * columns, values, generator=generator),
        "pixel_attention_mask": torch.ones(1, rows * columns, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[rows, columns]]),
    }
