"""Tiny dual encoders with their processors on disk, and images of coloured shapes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tiny_models import CLIPImageProcessorPil, Siglip2ImageProcessorPil, SiglipImageProcessorPil
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    PreTrainedModel,
    Siglip2Config,
    Siglip2Model,
    Siglip2Processor,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
)

from na_lora_lightning.arguments import AdapterOptions, LoRAOptions, ScheduleOptions
from na_lora_lightning.data.classes.datamodule import LabelledImageDataModule
from na_lora_lightning.modules.dual_encoder import DualEncoderLightningModule

SIDE, PATCH, LENGTH = 16, 8, 36
LETTERS = "abcdefghijklmnopqrstuvwxyz."
# Real tokenizers of CLIP have the end last, and pad with it.
CLIP_VOCABULARY = {
    token: index
    for index, token in enumerate(
        [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    )
}
CLIP_END = CLIP_VOCABULARY["<|endoftext|>"]
SIGLIP_VOCABULARY = {
    token: index for index, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS])
}
SHAPES = ("blue_bar", "green_square", "red_circle", "yellow_frame")


def _text(vocabulary: dict[str, int], **options: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(vocabulary),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": LENGTH,
        **options,
    }


def _vision(**options: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {**sizes, "image_size": SIDE, "patch_size": PATCH, **options}


def tiny_clip(text_activation: str = "quick_gelu") -> PreTrainedModel:
    special = {"bos_token_id": CLIP_END - 1, "eos_token_id": CLIP_END, "pad_token_id": CLIP_END}
    text = _text(CLIP_VOCABULARY, hidden_act=text_activation, projection_dim=12, **special)
    vision = _vision(hidden_act="quick_gelu", projection_dim=12)
    # Weights as large as those of trained models, so that texts and images differ.
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12, initializer_factor=5.0))


def tiny_siglip(naflex: bool = False) -> PreTrainedModel:
    special = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    text = _text(SIGLIP_VOCABULARY, hidden_act="gelu_pytorch_tanh", projection_size=20, **special)
    vision = _vision(hidden_act="gelu_pytorch_tanh")
    if naflex:
        return Siglip2Model(Siglip2Config(text_config=text, vision_config={**vision, "num_patches": 16}))
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision))


def tiny_processor(kind: str) -> Any:
    square = {"height": SIDE, "width": SIDE}
    if kind == "clip":
        images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square)
        return CLIPProcessor(images, CLIPTokenizer(vocab=CLIP_VOCABULARY, model_max_length=LENGTH))
    tokenizer = Siglip2Tokenizer(vocab=SIGLIP_VOCABULARY, padding_side="right", model_max_length=LENGTH)
    if kind == "siglip2":
        return Siglip2Processor(Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=6), tokenizer)
    return SiglipProcessor(SiglipImageProcessorPil(size=square), tokenizer)


def saved_dual_encoder(folder: Path, kind: str = "clip", seed: int = 0, **options: Any) -> str:
    """Writes a model with its processor, and returns the folder."""
    torch.manual_seed(seed)
    model = tiny_clip(**options) if kind == "clip" else tiny_siglip(naflex=kind == "siglip2", **options)
    if kind != "clip":
        with torch.no_grad():
            model.logit_scale.fill_(3.0)
            model.logit_bias.fill_(-5.0)
    model.save_pretrained(folder)
    tiny_processor(kind).save_pretrained(folder)
    return str(folder)


def shape_image(name: str, draw: random.Random, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """A coloured shape somewhere on a dark background."""
    image = Image.new("RGB", size, tuple(draw.randrange(40) for _ in range(3)))
    left, upper = draw.randrange(4), draw.randrange(4)
    box = (left, upper, left + 15, upper + 15)
    pen = ImageDraw.Draw(image)
    if name == "red_circle":
        pen.ellipse(box, fill="red")
    elif name == "green_square":
        pen.rectangle(box, fill="green")
    elif name == "blue_bar":
        pen.rectangle((0, upper + 4, size[0], upper + 12), fill="blue")
    else:
        pen.rectangle(box, outline="yellow", width=4)
    return image


def write_shapes(folder: Path, count: int, seed: int = 0) -> str:
    """A folder for each class with ``count`` images, and returns the folder."""
    draw = random.Random(seed)
    for name in SHAPES:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            shape_image(name, draw).save(folder / name / f"{index}.png")
    return str(folder)


def write_lines(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def make_module(base: str, **options: Any) -> DualEncoderLightningModule:
    settings: dict[str, Any] = {
        "lora": LoRAOptions(r=4, alpha=8),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
        "schedule": ScheduleOptions(name="constant", warmup_fraction=0.0),
        "adapter": AdapterOptions(write="never"),
    }
    return DualEncoderLightningModule(base, **{**settings, **options})


def configured(base: str, **options: Any) -> DualEncoderLightningModule:
    """A module with its model loaded and an adapter that does something."""
    module = make_module(base, **{"class_names": list(SHAPES), **options})
    torch.manual_seed(3)
    module.configure_model()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in module.peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    return module


def some_images(base: str, folder: str, count: int = 6) -> dict[str, torch.Tensor]:
    """A batch of the training data of a folder."""
    data = LabelledImageDataModule(base, train=folder, batch_size=count)
    data.setup("fit")
    return next(iter(data.train_dataloader()))
