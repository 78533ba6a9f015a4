"""The arguments of a training step: text wherever the model takes it alone, and what else a type insists on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig

Mapping = Literal[
    "causal-lm",
    "image-text-to-text",
    "seq2seq",
    "masked-lm",
    "text-encoding",
    "image-classification",
    "speech",
    "diffusers",
]

# Sixteen tokens, of which the second sequence has five of padding.
LENGTHS = (16, 11)
# What a decoder writes has lengths of its own; here the first sequence has three tokens of padding.
DECODER_LENGTHS = (9, 12)
# Ids of plain words: the smallest and the largest belong to special tokens.
WORDS = (4, 56)
IMAGE = (3, 16, 16)


def text_inputs(forward: Callable[..., Any], config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Any]:
    """Two sequences of words, the second padded on the right, as far as ``forward`` takes them."""
    accepted = inspect.signature(forward).parameters
    mask = (torch.arange(LENGTHS[0])[None] < torch.tensor(LENGTHS)[:, None]).long()
    padding = getattr(config.get_text_config(decoder=True), "pad_token_id", None) or 0
    tokens = torch.randint(*WORDS, (2, LENGTHS[0]), generator=generator).masked_fill(mask == 0, padding)
    inputs: dict[str, Any] = {"input_ids": tokens, "labels": tokens.masked_fill(mask == 0, -100)}
    if "attention_mask" in accepted:
        inputs["attention_mask"] = mask
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def noise(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def with_image(inputs: dict[str, Any], config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Any]:
    """One image for each sequence."""
    return {**inputs, "pixel_values": noise(generator, 2, *IMAGE)}


def image_tokens(count: int, token: int, inputs: dict[str, Any]) -> dict[str, Any]:
    """Puts ``count`` tokens that stand for an image before the words."""
    front = torch.full((2, count), token)
    return {
        **inputs,
        "input_ids": torch.cat([front, inputs["input_ids"]], 1),
        "attention_mask": torch.cat([torch.ones_like(front), inputs["attention_mask"]], 1),
        "labels": torch.cat([torch.full_like(front, -100), inputs["labels"]], 1),
    }


def queries(inputs: dict[str, Any], config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Any]:
    """An image whose queries fill tokens of the text."""
    token = config.image_token_index if config.model_type != "instructblipvideo" else config.video_token_index
    frames = 1 if config.model_type != "instructblipvideo" else 2
    inputs = with_image(image_tokens(frames * config.num_query_tokens, token, inputs), config, generator)
    if frames > 1:
        inputs["pixel_values"] = noise(generator, 2, frames, *IMAGE)
    if config.model_type != "blip-2":
        inputs["qformer_input_ids"] = torch.randint(*WORDS, (2, 5), generator=generator)
    return inputs


def captions(inputs: dict[str, Any], config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Any]:
    """An image for the encoder and a text for the decoder, which predicts each token from those before."""
    return {
        "pixel_values": noise(generator, 2, *IMAGE),
        "decoder_input_ids": inputs["input_ids"].roll(1, 1),
        "labels": inputs["labels"],
    }


def patches(inputs: dict[str, Any], config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Any]:
    """Flattened patches, led by their row and column, and a text for the decoder."""
    vision: Any = config.vision_config
    places = torch.tensor([[row, column] for row in (1, 2) for column in (1, 2)]).float()
    values = noise(generator, 2, len(places), vision.patch_embed_hidden_size)
    return {"flattened_patches": torch.cat([places.expand(2, -1, -1), values], -1), "labels": inputs["labels"]}


def codebooks(inputs: dict[str, Any], config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Any]:
    """Tokens in several codebooks at once; the model makes its inputs from the labels."""
    count: int = config.num_codebooks
    tokens = torch.randint(*WORDS, (2 * count, LENGTHS[0]), generator=generator)
    labels = tokens.reshape(2, count, -1).transpose(1, 2)
    labels = labels.masked_fill(inputs["attention_mask"][..., None] == 0, -100)
    return {**inputs, "input_ids": tokens, "labels": labels}


def gated_images(inputs: dict[str, Any], config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Any]:
    """One image for each sequence, which all words see."""
    return {
        **inputs,
        "pixel_values": noise(generator, 2, 1, *IMAGE),
        "image_attention_mask": torch.ones(2, LENGTHS[0], 1, dtype=torch.long),
    }


def image_embeddings(inputs: dict[str, Any], config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Any]:
    """An image in the place of the first tokens."""
    count: int = config.latent_query_num
    mask = torch.zeros_like(inputs["input_ids"])
    mask[:, :count] = 1
    return {**inputs, "pixel_values": noise(generator, 2, *IMAGE), "image_embeds_position_mask": mask}


def robot(inputs: dict[str, Any], config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Any]:
    """A state, the actions to learn, and the noise that is otherwise drawn."""
    vlm: Any = config.vlm_config
    shape = (2, config.chunk_size, config.max_action_dim)
    vision = vlm.vision_config
    count = (vision.image_size // vision.patch_size) ** 2
    inputs = image_tokens(count, vlm.image_token_id, inputs)
    return {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "pixel_values": noise(generator, 2, 1, *IMAGE),
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
        "state": noise(generator, 2, config.max_state_dim),
        "noise": noise(generator, *shape),
        "actions": noise(generator, *shape),
        "timestep": torch.tensor([0.3, 0.7]),
    }


def text_kinds(inputs: dict[str, Any], config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Any]:
    """Says of every token that it is text."""
    return {**inputs, "mm_token_type_ids": torch.zeros_like(inputs["input_ids"])}


def boxes(inputs: dict[str, Any], config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Any]:
    """A place on the page for every token."""
    corners = torch.rand(2, LENGTHS[0], 4, generator=generator).sort(-1).values
    return {**inputs, "bbox": corners}


def spoken_codes(inputs: dict[str, Any], config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Any]:
    """Codes of sound, several for each token of text."""
    codes = torch.randint(*WORDS, (2, LENGTHS[0], config.num_codebooks), generator=generator)
    return {**inputs, "input_ids": torch.cat([inputs["input_ids"][..., None], codes], -1)}


def heard_tokens(inputs: dict[str, Any], config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Any]:
    """Sound that is added to the tokens, eight frames to each."""
    bins: int = config.audio_config.num_mel_bins
    return {**inputs, "input_features": noise(generator, 2, bins, 8 * LENGTHS[0])}


def dialogue(inputs: dict[str, Any], config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Any]:
    """Text for the encoder, and what is to be heard in several codes at once."""
    channels: int = config.decoder_config.num_channels
    longest = max(DECODER_LENGTHS)
    mask = torch.arange(longest)[None] < torch.tensor(DECODER_LENGTHS)[:, None]
    codes = torch.randint(*WORDS, (2, longest, channels), generator=generator)
    labels = codes.masked_fill(~mask[..., None], -100).transpose(1, 2).flatten(0, 1)
    return {
        **{name: inputs[name] for name in ("input_ids", "attention_mask", "use_cache")},
        "decoder_input_ids": codes,
        "decoder_attention_mask": mask.long(),
        "labels": labels,
    }


SPECIAL: dict[str, Callable[[dict[str, Any], PreTrainedConfig, torch.Generator], dict[str, Any]]] = {
    "blip": with_image,
    "dia": dialogue,
    "kyutai_speech_to_text": spoken_codes,
    "blip-2": queries,
    "git": with_image,
    "idefics": gated_images,
    "instructblip": queries,
    "instructblipvideo": queries,
    "kosmos-2": image_embeddings,
    "molmo2": text_kinds,
    "musicgen": codebooks,
    "musicgen_melody": codebooks,
    "pi0": robot,
    "pix2struct": patches,
    "pp_formulanet": captions,
    "udop": boxes,
    "vision-encoder-decoder": captions,
    "voxtral_realtime": heard_tokens,
}


def lengths_of_its_own(inputs: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """Labels for a decoder, from which the model makes the decoder's tokens."""
    longest = max(DECODER_LENGTHS)
    padding = torch.arange(longest)[None] >= torch.tensor(DECODER_LENGTHS)[:, None]
    labels = torch.randint(*WORDS, (len(DECODER_LENGTHS), longest), generator=generator)
    return {**inputs, "labels": labels.masked_fill(padding, -100)}


def shifted(inputs: dict[str, Any], config: PreTrainedConfig, generator: torch.Generator) -> dict[str, Any]:
    """The decoder's tokens, for a model that does not make them from labels."""
    labels = inputs["labels"]
    return {**inputs, "decoder_input_ids": labels.masked_fill(labels < 0, 5).roll(1, 1)}


def some_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    """Labels at every third token alone, as where words are masked."""
    labels = inputs["labels"].clone()
    labels[:, torch.arange(labels.shape[1]) % 3 != 1] = -100
    return {**inputs, "labels": labels}
