"""Models are probed from their configurations; parts that a probe does not reach get the same answer as with inputs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_encoder_decoders import BART, SMALL, WAV2VEC2, WHISPER, UNet, bart, clip, images
from tiny_models import with_lora
from torch import Tensor, nn
from torch.nn import functional
from transformers import BartConfig as DecoderConfig
from transformers import (
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
    T5Config,
    T5ForConditionalGeneration,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.errors import DiscoveryError

VIT: dict[str, Any] = {**SMALL, "image_size": 16, "patch_size": 8}


def vit_with_bart() -> VisionEncoderDecoderModel:
    decoder = DecoderConfig(**{**BART, "is_decoder": True, "add_cross_attention": True})
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VIT), decoder)
    config.decoder_start_token_id = config.pad_token_id = 1
    return VisionEncoderDecoderModel(config)


KNOWN: dict[str, tuple[Callable[[], Any], list[str], int]] = {
    "bart": (bart(), ["fc1"], 2),
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=12, num_layers=1, num_heads=2, pad_token_id=0)
        ),
        ["wi"],
        2,
    ),
    "clip": (clip, ["fc1"], 2),
    "whisper": (lambda: WhisperForConditionalGeneration(WhisperConfig(**WHISPER)), ["fc1"], 2),
    "vit": (lambda: ViTForImageClassification(ViTConfig(**VIT)), ["intermediate.dense", "fc1"], 1),
    "wav2vec2": (lambda: Wav2Vec2ForCTC(Wav2Vec2Config(**WAV2VEC2)), ["intermediate_dense"], 1),
    "vision encoder-decoder": (vit_with_bart, ["intermediate.dense", "fc1"], 2),
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_a_configuration_says_is_enough(name: str) -> None:
    make, targets, gates = KNOWN[name]
    assert len(discover_gates(with_lora(make(), targets, task_type=None)).require()) == gates


def test_with_and_without_example_inputs_the_answer_is_the_same() -> None:
    model = with_lora(clip(), ["fc1"], task_type=None)
    batch, _ = images()
    found = [discover_gates(model, example).require() for example in (None, batch)]
    assert [site.name for site in found[0]] == [site.name for site in found[1]]
    assert [site.branch for site in found[0]] == [site.branch for site in found[1]]


class Denoiser(UNet):
    """Called as diffusers calls its UNets."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=3, block_out_channels=(8, 8), cross_attention_dim=6)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(sample, timestep[:, None].expand(-1, 4) * encoder_hidden_states.mean())


def test_a_unet_is_probed_from_its_configuration() -> None:
    targets = ["time_embedding.0", "net.0.proj"]
    model = get_peft_model(Denoiser(), LoraConfig(r=2, target_modules=targets))
    assert len(discover_gates(model).require()) == 3
    # What tells the network the time is not part of it where none of that has LoRA.
    model = get_peft_model(Denoiser(), LoraConfig(r=2, target_modules=["net.0.proj"]))
    gates = discover_gates(model).require()
    assert [site.lora_layer_name for site in gates] == ["blocks.0.net.0.proj", "blocks.1.net.0.proj"]
    assert [(entry.name, entry.reason.split(",")[0]) for entry in gates.left_out] == [
        ("time_embedding.1", "it acts on one vector for each sample")
    ]


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, sequence: Tensor, structure: Tensor, scale: float = 1.0) -> Tensor:
        return self.down(functional.silu(self.up(sequence + structure)) * scale)


def test_where_nothing_is_known_the_error_says_what_to_give() -> None:
    model = get_peft_model(Own(), LoraConfig(r=2, target_modules=["up"]))
    with pytest.raises(DiscoveryError) as refusal:
        discover_gates(model)
    assert str(refusal.value) == (
        "Own has no vocabulary size in its config, nor sizes of images or sound, so no probe input can be made for it; "
        "pass example_inputs, a dictionary of keyword arguments for one small forward pass (all of sequence, "
        "structure)."
    )


# ---- parts that a few tokens do not reach ----


def paligemma() -> PaliGemmaForConditionalGeneration:
    text = GemmaConfig(**{**SMALL, "vocab_size": 64, "num_key_value_heads": 1, "head_dim": 8})
    vision = SiglipVisionConfig(**{**VIT, "vision_use_head": False})
    return PaliGemmaForConditionalGeneration(
        PaliGemmaConfig(
            text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_id=63, projection_dim=16
        )
    )


def with_image() -> dict[str, Tensor]:
    tokens = torch.tensor([[63, 63, 63, 63, 5, 6, 7]])
    pixels = torch.randn(1, 3, 16, 16)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": pixels}


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("targets", [r".*(gate_proj|[qkv]_proj)", r".*language_model.*gate_proj", r".*(gate_proj|fc1)"])
def test_a_tower_gets_the_same_answer_with_and_without_example_inputs(targets: str, allow: bool) -> None:
    answers = []
    for example in (None, with_image()):
        gates = discover_gates(with_lora(paligemma(), targets, task_type=None), example)
        try:
            answers.append([site.name for site in gates.require(allow)])
        except DiscoveryError as error:
            answers.append([str(error)])
    assert answers[0] == answers[1]
    if "qkv" in targets and not allow:
        assert answers[0][0].startswith("1 of 2 gates have no LoRA (model.vision_tower.")
        assert "extend the LoRA targets to the layers before them ('fc1'), or set allow_unmasked_gates" in answers[0][0]


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.activation_fn, self.fc1, self.fc2 = nn.GELU(), nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


class TwoBranches(nn.Module):
    """As Florence-2: a tower that a probe with text does not reach."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.text, self.tower = Block(), nn.ModuleList([Block(width), Block(width)])

    def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
        x = self.text(x)
        for block in self.tower if image is not None else ():
            x = block(x)
        return x


@pytest.mark.parametrize("width", [12, 8])
def test_blocks_whose_gates_have_no_lora_are_told_so(width: int) -> None:
    """LoRA on fc2 makes no gate, whether a probe comes there or not."""
    x = torch.randn(1, 3, 8)
    messages = []
    for example in ({"x": x}, {"x": x, "image": x}):
        model = get_peft_model(
            TwoBranches(width),
            LoraConfig(r=2, target_modules=["text.fc1", "tower.0.fc2", "tower.1.fc2"]),
        )
        with pytest.raises(DiscoveryError) as refusal:
            discover_gates(model, example).require()
        messages.append(str(refusal.value))
    expected = (
        "2 of 3 gates have no LoRA (tower.0.activation_fn, tower.1.activation_fn); extend the LoRA targets to the "
        "layers before them ('fc1'), or set allow_unmasked_gates=True to leave those gates as they are."
    )
    assert messages == [expected, expected]


def test_remedies_for_what_was_not_reached_are_joined_by_or() -> None:
    model = get_peft_model(
        TwoBranches(12),
        LoraConfig(r=2, target_modules=["text.fc1", "tower.0.fc1", "tower.1.fc2"]),
    )
    with pytest.raises(DiscoveryError) as refusal:
        discover_gates(model, {"x": torch.randn(1, 3, 8)}).require()
    assert str(refusal.value) == (
        "the gates of 1 layers with LoRA cannot be masked (tower.0.activation_fn): the probe's forward pass did not "
        "call it (an expert that no token was sent to, or a part for images or sound); pass example_inputs that "
        "reach every part with LoRA, or take these layers out of the LoRA targets, or set allow_unmasked_gates=True to "
        "train those as plain LoRA does."
    )
