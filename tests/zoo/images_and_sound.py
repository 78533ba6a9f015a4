"""The arguments of a training step of models of images and of sound."""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from typing import Any

import torch
from transformers import PreTrainedConfig
from zoo.inputs import LENGTHS, WORDS, image_tokens, lengths_of_its_own, noise, with_image


def image(config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Any]:
    """Two images with a class each."""
    part: Any = getattr(config, "vision_config", config)
    size, channels = getattr(part, "image_size", 16), getattr(part, "num_channels", 3)
    size = 64 if config.model_type in LARGER else size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return {"pixel_values": noise(generator, 2, channels, height, width), "labels": torch.tensor([0, 1])}


def patches_of_two_images(config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Any]:
    """Flattened patches of a large and a small image, the latter padded."""
    vision: Any = config.vision_config
    count = 16
    mask = torch.arange(count)[None] < torch.tensor([16, 6])[:, None]
    return {
        "pixel_values": noise(generator, 2, count, vision.num_channels * vision.patch_size**2),
        "pixel_attention_mask": mask.long(),
        "spatial_shapes": torch.tensor([[4, 4], [2, 3]]),
        "labels": torch.tensor([0, 1]),
    }


def pixels_as_tokens(config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Any]:
    """Images as sequences of colours."""
    return {
        "input_ids": torch.randint(*WORDS, (2, LENGTHS[0]), generator=generator),
        "labels": torch.tensor([0, 1]),
        "use_cache": False,
    }


def safe_image(inputs: dict[str, Any], config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Any]:
    """An image and a question about it, which the last token answers."""
    inputs = with_image(image_tokens(config.mm_tokens_per_image, config.image_token_index, inputs), config, generator)
    kinds = (inputs["input_ids"] == config.image_token_index).long()
    del inputs["labels"]
    return {**inputs, "token_type_ids": kinds}


Maker = Callable[[PreTrainedConfig, torch.Generator], dict[str, Any]]
# Types that halve their images several times, whatever the size.
LARGER = {"convnext", "convnextv2", "cvt", "efficientnet", "mobilevit", "mobilevitv2", "segformer", "swiftformer"}
IMAGES: dict[str, Maker] = {
    "imagegpt": pixels_as_tokens,
    "siglip2": patches_of_two_images,
}


# Frames or steps of a recording, of which the second sound has a third of silence; its letters are fewer.
FRAMES, LETTERS = (48, 32), 3
# Whisper's frames come bin by bin, and as many as its encoder has places for.
WHISPER_FRAMES = (128, 84)


def recordings(config: PreTrainedConfig, accepted: Container[str], generator: torch.Generator) -> dict[str, Any]:
    """Two sounds, the second filled up, and what is said in them."""
    parts = [part for part in vars(config).values() if isinstance(part, PreTrainedConfig)]

    def setting(*names: str) -> Any:
        found = (getattr(part, name, None) for name in names for part in (config, *parts))
        return next((value for value in found if value is not None), None)

    frames = torch.tensor(FRAMES if config.model_type != "whisper" else WHISPER_FRAMES)[:, None]
    mask = torch.arange(int(frames.max()))[None] < frames
    if "input_features" in accepted and setting("conv_stride") is None:
        bins = setting("input_feat_per_channel", "feature_projection_input_dim", "num_mel_bins", "input_dim", "d_model")
        bins = 4 * bins if config.model_type == "granite_speech5_ctc" else bins
        features = noise(generator, *mask.shape, bins)
        features = features.transpose(1, 2) if config.model_type == "whisper" else features
        inputs = {"input_features": features, "attention_mask": mask.long()}
    else:
        step = math.prod(setting("conv_stride") or (480,)) // 2
        mask = mask.repeat_interleave(step, dim=1)
        inputs = {"input_values": noise(generator, *mask.shape) * mask, "attention_mask": mask.long()}
    if "decoder_input_ids" not in accepted:
        return {**inputs, "labels": torch.randint(*WORDS, (2, LETTERS), generator=generator) // 2}
    return lengths_of_its_own(inputs, generator)
