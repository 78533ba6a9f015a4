"""Small inputs that make a model run, from what its configuration says of text, images and sound."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from na_lora_lightning.core.model_entry import MASKS, vocabulary_size
from na_lora_lightning.core.model_parts import has_decoder
from na_lora_lightning.errors import DiscoveryError

_TOKENS = 4
_NAMES_IN_ERROR = 8
_OF_TEXT = ("attention_mask", "decoder_attention_mask", "input_ids", "decoder_input_ids")


def probe_inputs(root: nn.Module) -> list[dict[str, Any]]:
    """What a model may be called with, the simplest first.

    Args:
        root: A model with a Hugging Face configuration, of text, images, sound, or several of them.

    Returns:
        Keyword arguments for its forward: tokens where it has a vocabulary, images of the size that it is for, sound
        as it takes it, and something to denoise. Empty where nothing is known.
    """
    config = getattr(root, "config", None)
    if config is None:
        return []
    text, decoder = _text(root), _decoder_text(root)
    images, sound, latents = _images(root, config), _sound(root, config), _latents(root, config)
    attempts = [{**text, **decoder}] if text else []
    if images:
        attempts += [{**text, **images, **decoder}] if text else []
        attempts.append({**images, **decoder})
    attempts += [{**more, **decoder} for more in sound]
    # For classes the decoder is given the encoder's tokens.
    attempts += [text] if text and decoder else []
    return attempts + ([latents] if latents else [])


def require_probe_inputs(root: nn.Module) -> list[dict[str, Any]]:
    """As :func:`probe_inputs`.

    Raises:
        DiscoveryError: Nothing is known, so the caller must give inputs.
    """
    attempts = probe_inputs(root)
    if not attempts:
        raise DiscoveryError(
            f"{type(root).__name__} has no vocabulary size in its config, nor sizes of images or sound, so no probe "
            f"input can be made for it; pass example_inputs, {what_to_give(root)}."
        )
    return attempts


def what_to_give(root: nn.Module) -> str:
    """What ``example_inputs`` have to hold, in words: the names that the model's forward takes."""
    parameters = [p for p in _parameters(root).values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = [p.name for p in parameters if p.default is p.empty]
    names = ", ".join((needed or [p.name for p in parameters])[:_NAMES_IN_ERROR])
    which = f" ({'all' if needed else 'some'} of {names})" if names else ""
    return f"a dictionary of keyword arguments for one small forward pass{which}"


def samples_of(inputs: Mapping[str, Any]) -> int | None:
    """How many samples a batch has: as its masks say, or else its first tensor; None where it holds none."""
    names = [*_OF_TEXT, *MASKS, *inputs]
    tensors = [inputs[name] for name in names if isinstance(inputs.get(name), Tensor) and inputs[name].ndim > 1]
    return len(tensors[0]) if tensors else None


def axes_told_apart(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Without its last sample, a batch of as many samples as tokens, whose axes look alike; nothing for others."""
    samples = samples_of(inputs)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim}
    if samples in (None, 1) or not any(value.shape[:2] == (samples, samples) for value in tensors.values()):
        return []
    return [{**inputs, **{name: value[:-1] for name, value in tensors.items() if len(value) == samples}}]


def _parameters(root: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(root.forward).parameters


def _takes(root: nn.Module, name: str) -> bool:
    """Whether the model's forward names an argument, or does not say what it takes."""
    parameters = _parameters(root)
    named = [p for p in parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return name in parameters or not named


def _device(root: nn.Module) -> torch.device:
    return next(root.parameters()).device


def _values(root: nn.Module, *shape: int) -> Tensor:
    """Numbers without a pattern, ``shape``, in the model's own type."""
    dtype = next((p.dtype for p in root.parameters() if p.is_floating_point()), torch.float32)
    count = torch.Size(shape).numel()
    return torch.arange(count, dtype=torch.float64).sin().view(shape).to(_device(root), dtype)


def _token_ids(root: nn.Module, count: int) -> Tensor | None:
    vocabulary = vocabulary_size(root)
    if vocabulary is None:
        return None
    return torch.arange(1, count + 1, device=_device(root)).remainder(vocabulary)[None]


def _text(root: nn.Module) -> dict[str, Any]:
    tokens = _token_ids(root, _TOKENS)
    if tokens is None or not _takes(root, "input_ids"):
        return {}
    all_of_them = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    return {name: value for name, value in all_of_them.items() if _takes(root, name)}


def _decoder_text(root: nn.Module) -> dict[str, Any]:
    # Of another length than the encoder's, so that the two cannot be taken for each other.
    tokens = _token_ids(root, _TOKENS - 1)
    if tokens is None or "decoder_input_ids" not in _parameters(root) or not has_decoder(root):
        return {}
    return {"decoder_input_ids": tokens}


def _sizes(value: Any) -> list[int]:
    """Height and width from a number, a pair, or a mapping of them."""
    if isinstance(value, Mapping):
        value = [value[name] for name in ("height", "width") if name in value]
    sizes = [value, value] if isinstance(value, int) else value
    fits = isinstance(sizes, (list, tuple)) and len(sizes) == 2 and all(isinstance(size, int) for size in sizes)
    return list(sizes) if fits else []


def _images(root: nn.Module, config: Any) -> dict[str, Any]:
    if "pixel_values" not in _parameters(root):
        return {}
    for part in ("vision_config", "encoder", None):
        own = config if part is None else getattr(config, part, None)
        sizes = _sizes(getattr(own, "image_size", None))
        if sizes:
            return {"pixel_values": _values(root, 1, getattr(own, "num_channels", None) or 3, *sizes)}
    # Convolutions take any size.
    channels = getattr(config, "num_channels", None)
    return {"pixel_values": _values(root, 1, channels, 64, 64)} if isinstance(channels, int) else {}


def _sound(root: nn.Module, config: Any) -> list[dict[str, Any]]:
    parameters = _parameters(root)
    parts = (getattr(config, name, None) for name in ("encoder", "audio_config", "encoder_config"))
    encoder = next((part for part in parts if part is not None), config)
    bins = getattr(encoder, "num_mel_bins", None)
    found: list[dict[str, Any]] = []
    if "input_features" in parameters:
        longest = getattr(encoder, "max_source_positions", None)
        wide = getattr(encoder, "input_feat_per_channel", None) or getattr(
            encoder, "feature_projection_input_dim", None
        )
        if isinstance(wide, int):
            found.append({"input_features": _values(root, 1, 4 * _TOKENS, wide)})
        if isinstance(bins, int) and isinstance(longest, int):
            found.append({"input_features": _values(root, 1, bins, 2 * longest)})
        elif isinstance(bins, int):
            found.append({"input_features": _values(root, 1, 16 * _TOKENS, bins)})
    if "input_values" in parameters:
        longest = getattr(encoder, "max_length", None)
        if isinstance(bins, int) and isinstance(longest, int):
            found.append({"input_values": _values(root, 1, longest, bins)})
        stride = 1
        for step in getattr(encoder, "conv_stride", None) or (400,):
            stride *= step
        found.append({"input_values": _values(root, 1, 3 * _TOKENS * stride)})
    return found


def _latents(root: nn.Module, config: Any) -> dict[str, Any]:
    """Of diffusion models: something to denoise, when, and what is told of it."""
    channels = getattr(config, "in_channels", None)
    if not {"sample", "timestep"} <= set(_parameters(root)) or not isinstance(channels, int):
        return {}
    size = 2 ** len(getattr(config, "block_out_channels", (1, 1)))
    inputs = {"sample": _values(root, 1, channels, size, size), "timestep": torch.ones(1, device=_device(root))}
    width = getattr(config, "cross_attention_dim", None)
    if isinstance(width, int) and "encoder_hidden_states" in _parameters(root):
        inputs["encoder_hidden_states"] = _values(root, 1, _TOKENS, width)
    return inputs
