"""Tiny denoisers of diffusers: UNets and transformers, with what one step of training gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

TEXT, WORDS = 12, 7
SPACE = {"sample_size": 8, "in_channels": 4, "out_channels": 4}
UNET = {
    **SPACE,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT,
}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
PATCHES = {**SPACE, "patch_size": 2, **HEADS}
GATES = ("geglu", "gelu", "gelu-approximate", "swiglu")


class Denoiser(NamedTuple):
    """How to make a model.

    Attributes:
        kind: Its class in diffusers.
        config: What differs from its defaults.
        inputs: Makes the arguments of its forward pass.
    """

    kind: str
    config: dict[str, Any]
    inputs: Callable[[torch.Generator], dict[str, Any]]


def _noise(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def image(generator: torch.Generator) -> dict[str, Any]:
    """Two noisy images at different times, each with a text."""
    return {
        "sample": _noise(generator, 2, 4, 8, 8),
        "timestep": torch.tensor([3, 500]),
        "encoder_hidden_states": _noise(generator, 2, WORDS, TEXT),
    }


def hidden(generator: torch.Generator) -> dict[str, Any]:
    """The same under the name that transformers give it."""
    inputs = image(generator)
    return {"hidden_states": inputs.pop("sample"), **inputs}


def classes(generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": _noise(generator, 2, 4, 8, 8),
        "timestep": torch.tensor([3, 500]),
        "class_labels": torch.tensor([1, 2]),
    }


def pooled(generator: torch.Generator) -> dict[str, Any]:
    return {**hidden(generator), "pooled_projections": _noise(generator, 2, TEXT)}


def sequence(generator: torch.Generator) -> dict[str, Any]:
    """Patches in a row, with their places and those of the text."""
    return {
        "hidden_states": _noise(generator, 2, 16, 4),
        "timestep": torch.tensor([0.3, 0.7]),
        "encoder_hidden_states": _noise(generator, 2, WORDS, TEXT),
        "pooled_projections": _noise(generator, 2, TEXT),
        "img_ids": torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], 1),
        "txt_ids": torch.zeros(WORDS, 3),
    }


def without(make: Callable[[torch.Generator], dict[str, Any]], *names: str) -> Callable[..., dict[str, Any]]:
    return lambda generator: {name: value for name, value in make(generator).items() if name not in names}


def video(generator: torch.Generator) -> dict[str, Any]:
    """Frames behind the channels."""
    return {**image(generator), "sample": _noise(generator, 2, 4, 3, 8, 8)}


def hidden_video(generator: torch.Generator) -> dict[str, Any]:
    inputs = video(generator)
    return {"hidden_states": inputs.pop("sample"), **inputs}


def frames(generator: torch.Generator) -> dict[str, Any]:
    """Frames before the channels."""
    inputs = hidden_video(generator)
    return {**inputs, "hidden_states": inputs["hidden_states"].transpose(1, 2)}


def masked(make: Callable[[torch.Generator], dict[str, Any]], name: str) -> Callable[..., dict[str, Any]]:
    """Of which text the second has fewer words."""
    mask = torch.arange(WORDS)[None] < torch.tensor([[WORDS], [4]])
    return lambda generator: {**make(generator), name: mask.long()}


DENOISERS: dict[str, Denoiser] = {
    "UNet2DConditionModel": Denoiser(
        "UNet2DConditionModel",
        {
            **UNET,
            "attention_head_dim": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        image,
    ),
    "UNet3DConditionModel": Denoiser(
        "UNet3DConditionModel",
        {
            **UNET,
            "attention_head_dim": 4,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        },
        video,
    ),
    **{
        f"Transformer2DModel ({function})": Denoiser(
            "Transformer2DModel",
            {
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "num_layers": 2,
                "in_channels": 4,
                "norm_num_groups": 2,
                "cross_attention_dim": TEXT,
                "activation_fn": function,
            },
            without(hidden, "timestep"),
        )
        for function in GATES
    },
    "DiTTransformer2DModel": Denoiser(
        "DiTTransformer2DModel", {**PATCHES, "num_embeds_ada_norm": 10, "norm_num_groups": 2}, classes
    ),
    "PixArtTransformer2DModel": Denoiser(
        "PixArtTransformer2DModel",
        {**PATCHES, "caption_channels": TEXT, "cross_attention_dim": 16, "norm_num_groups": 2},
        masked(
            lambda g: {**hidden(g), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
            "encoder_attention_mask",
        ),
    ),
    "SD3Transformer2DModel": Denoiser(
        "SD3Transformer2DModel",
        {
            **PATCHES,
            "joint_attention_dim": TEXT,
            "caption_projection_dim": 16,
            "pooled_projection_dim": TEXT,
            "pos_embed_max_size": 8,
        },
        pooled,
    ),
    "FluxTransformer2DModel": Denoiser(
        "FluxTransformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "joint_attention_dim": TEXT,
            "pooled_projection_dim": TEXT,
            "axes_dims_rope": (2, 2, 4),
        },
        sequence,
    ),
    "AuraFlowTransformer2DModel": Denoiser(
        "AuraFlowTransformer2DModel",
        {
            **SPACE,
            "patch_size": 2,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "joint_attention_dim": TEXT,
            "caption_projection_dim": 16,
            "pos_embed_max_size": 16,
        },
        lambda g: {**hidden(g), "timestep": torch.tensor([0.3, 0.7])},
    ),
    "CogVideoXTransformer3DModel": Denoiser(
        "CogVideoXTransformer3DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 6,
            "text_embed_dim": TEXT,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 9,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": WORDS,
        },
        frames,
    ),
    "WanTransformer3DModel": Denoiser(
        "WanTransformer3DModel",
        {
            **HEADS,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": TEXT,
            "freq_dim": 16,
            "ffn_dim": 24,
            "rope_max_seq_len": 16,
        },
        hidden_video,
    ),
    "SanaTransformer2DModel": Denoiser(
        "SanaTransformer2DModel",
        {
            **PATCHES,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": TEXT,
        },
        hidden,
    ),
    "Lumina2Transformer2DModel": Denoiser(
        "Lumina2Transformer2DModel",
        {
            **SPACE,
            "sample_size": 8,
            "patch_size": 2,
            "hidden_size": 16,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 4,
            "axes_dim_rope": (2, 2, 4),
            "axes_lens": (32, 16, 16),
            "cap_feat_dim": TEXT,
        },
        masked(hidden, "encoder_attention_mask"),
    ),
    "ChromaTransformer2DModel": Denoiser(
        "ChromaTransformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "joint_attention_dim": TEXT,
            "axes_dims_rope": (2, 2, 4),
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 12,
            "approximator_layers": 1,
        },
        without(sequence, "pooled_projections"),
    ),
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A model with random weights and the arguments of one forward pass."""
    import diffusers

    denoiser = DENOISERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = getattr(diffusers, denoiser.kind)(**denoiser.config)
    return model, denoiser.inputs(torch.Generator().manual_seed(seed + 1))
