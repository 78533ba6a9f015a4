"""A small vision-language model: one of the study's language models, a vision tower and a projector.

The tower learns to classify digits, and the projector, in front of the frozen tower and language model, to have it
answer "Which digit?". Both see training images alone. The result is a LLaVA folder that transformers reads, with
``pretraining.json`` beside the weights as for the language models.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from benchmarks.study.base_models.language import mean_loss, weights_digest
from benchmarks.study.base_models.loading import read_record
from benchmarks.study.tasks import corpus
from benchmarks.study.tasks.encoding import collate, encode
from benchmarks.study.tasks.examples import Example
from benchmarks.study.tasks.pictures import ENLARGED, QUESTIONS, as_picture, digits, parts_of_images

LANGUAGE_MODELS = {"llava-silu": "llama-silu"}
_IMAGE_TOKEN = "<image>"
_SIDE, _PATCH = ENLARGED * 8, 8
_PATCHES = (_SIDE // _PATCH) ** 2
_TOWER: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": _SIDE,
    "patch_size": _PATCH,
    "hidden_act": "quick_gelu",
}


def _batches(count: int, size: int, steps: int) -> Iterator[Tensor]:
    """Numbers of the images of each step: one permutation after the other, cut into batches."""
    generator = torch.Generator().manual_seed(0)
    passes = -(-steps * size // count)
    stream = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])
    yield from stream[: steps * size].split(size)


def make_processor(language_model: Path) -> LlavaProcessor:
    """The language model's tokenizer with a token for images; grey values become -1 to 1."""
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    tokenizer.add_special_tokens({"additional_special_tokens": [_IMAGE_TOKEN]})
    side = {"height": _SIDE, "width": _SIDE}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": _SIDE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=_IMAGE_TOKEN,
    )


def shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Moves each of ``[images, 3, 16, 16]`` by up to one pixel of its original 8 × 8 in each direction."""
    side = pixels.shape[-1]
    padded = functional.pad(pixels, (ENLARGED,) * 4, value=-1.0)
    corners = (ENLARGED * torch.randint(0, 3, (len(pixels), 2), generator=generator)).tolist()
    return torch.stack([image[:, y : y + side, x : x + side] for image, (y, x) in zip(padded, corners, strict=True)])


def train_tower(pixels: Tensor, labels: Tensor, steps: int, rate: float) -> tuple[CLIPVisionModel, nn.Module]:
    """Trains a tower as a classifier, every patch by itself, as the language model sees each as a token.

    Args:
        pixels: ``[images, 3, 16, 16]``.
        labels: Digits, ``[images]`` int64.
        steps: Steps of 64 images; AdamW, cosine to zero after a tenth of warm-up.
        rate: Highest learning rate.

    Returns:
        The tower, and the classifier upon its patches.
    """
    tower = CLIPVisionModel(CLIPVisionConfig(**_TOWER)).train()
    head = nn.Sequential(nn.LayerNorm(_TOWER["hidden_size"]), nn.Linear(_TOWER["hidden_size"], 10))
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for chosen in _batches(len(pixels), 64, steps):
        scores = head(patch_features(tower, shifted(pixels[chosen], generator)))
        loss = functional.cross_entropy(scores.flatten(0, 1), labels[chosen].repeat_interleave(_PATCHES))
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return tower.eval(), head.eval()


def patch_features(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """What LLaVA takes of the tower, ``[images, patches, hidden]``: the last layer without the class token."""
    features: Tensor = tower(pixel_values=pixels).last_hidden_state[:, 1:]
    return features


def assemble(tower: CLIPVisionModel, language: PreTrainedModel, image_token: int) -> LlavaForConditionalGeneration:
    """Joins a tower and a language model, both frozen, by a projector with random weights."""
    known = language.get_input_embeddings().num_embeddings
    language.resize_token_embeddings(image_token + 1, mean_resizing=False)
    with torch.no_grad():
        # Nothing predicts it, and a score of zero hardly takes any of the probability of other tokens.
        language.get_input_embeddings().weight[known:] = 0.0
    # A folder of this machine otherwise.
    language.config.name_or_path = Path(language.config.name_or_path).name
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_id=image_token,
        image_seq_length=_PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.tie_weights()
    model.generation_config = language.generation_config
    return model.requires_grad_(False).eval()


def train_projector(
    model: LlavaForConditionalGeneration, examples: list[dict[str, Tensor]], steps: int, rate: float
) -> float:
    """Trains the projector alone on batches of "Which digit?", again and again.

    Returns:
        Mean loss of the last ten steps, nats per token.
    """
    projector = model.model.multi_modal_projector.requires_grad_(True)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
    losses = []
    for step in range(steps):
        loss = model(**examples[step % len(examples)]).loss
        loss.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"projector step {step} loss {losses[-1]:.3f}", flush=True)
    projector.requires_grad_(False)
    return sum(losses[-10:]) / len(losses[-10:])


def pretrain(
    name: str,
    folder: Path,
    tower_steps: int = 600,
    tower_rate: float = 1e-3,
    projector_steps: int = 600,
    projector_rate: float = 2e-3,
    batch_size: int = 32,
) -> dict[str, Any]:
    """Trains tower and projector and saves the model under ``folder / name``.

    Args:
        name: A key of :data:`LANGUAGE_MODELS`.
        folder: Where models are kept, the language model among them.
        tower_steps: Steps of the tower.
        tower_rate: Its highest learning rate.
        projector_steps: Steps of the projector.
        projector_rate: Its highest learning rate.
        batch_size: Images in a step of the projector.

    Returns:
        What ``pretraining.json`` holds.
    """
    started = time.time()
    recipe = {
        "tower_steps": tower_steps,
        "tower_rate": tower_rate,
        "projector_steps": projector_steps,
        "projector_rate": projector_rate,
        "batch_size": batch_size,
        "seed": 0,
    }
    source = folder / LANGUAGE_MODELS[name]
    language_record = read_record(source)
    torch.manual_seed(0)
    processor = make_processor(source)
    images, shown = digits()
    parts = parts_of_images(len(images))
    labels = torch.tensor(shown)
    pixels = processor.image_processor(list(map(as_picture, images)), return_tensors="pt")["pixel_values"]
    tower, head = train_tower(pixels[parts["train"]], labels[parts["train"]], tower_steps, tower_rate)
    with torch.no_grad():
        told = head(patch_features(tower, pixels[parts["valid"]])).mean(dim=1).argmax(dim=1)
    accuracy = (told == labels[parts["valid"]]).float().mean().item()
    print(f"{name} tower accuracy {accuracy:.3f} after {time.time() - started:.0f} s", flush=True)
    language = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = processor.tokenizer
    model = assemble(tower, language, tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN))
    question = QUESTIONS["digit"]
    asked = [Example(question.text, question.answer(shown[number]), (images[number],)) for number in parts["train"]]
    encoded = encode(processor, asked, 64)
    batches = [
        collate([encoded[number] for number in chosen.tolist()], tokenizer.pad_token_id)
        for chosen in _batches(len(asked), batch_size, projector_steps)
    ]
    loss = train_projector(model, batches, projector_steps, projector_rate)
    place = folder / name
    model.to(torch.bfloat16).save_pretrained(place)
    processor.save_pretrained(place)
    # Rounding reached rotary frequencies, which are not saved: what the record tells of is the model that is read.
    model = LlavaForConditionalGeneration.from_pretrained(place, dtype=torch.float32)
    shutil.copy(source / "held_out.pt", place)
    record = {
        "name": name,
        "recipe": recipe,
        "packages": corpus.versions_of(["sklearn", "torch"]),
        "language_model": {key: language_record[key] for key in ("name", "weights_sha256", "held_out_loss")},
        "images_sha256": corpus.digest(text for example in asked for text in example.texts()),
        "train_images": len(asked),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tower_accuracy": accuracy,
        "projector_loss": loss,
        "held_out_loss": mean_loss(model, torch.load(place / "held_out.pt", weights_only=True)),
        "weights_sha256": weights_digest(model),
        "seconds": round(time.time() - started),
    }
    (place / "pretraining.json").write_text(json.dumps(record, indent=1))
    return record
