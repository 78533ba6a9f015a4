"""The model that is fine-tuned: a vision tower trained on digits, a projector, and a pretrained language model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from digits import IMAGE_SIDE, KINDS, as_picture, load_digits, split_images
from settings import Settings
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
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

PATCH_SIZE = 8
IMAGE_TOKENS = (IMAGE_SIDE // PATCH_SIZE) ** 2
IMAGE_TOKEN = "<image>"
# A question ends with a line break, and an answer with the token that ends a turn of SmolLM2.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ end_of_turn }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)
_LARGEST_SHIFT = 1
_TOWER_BATCH, _ALIGNMENT_BATCH = 64, 256


def image_processor() -> CLIPImageProcessorPil:
    """What turns a picture into the vision tower's input; grey values become -1 to 1."""
    side = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIDE}, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )


def load_pixels() -> tuple[Tensor, Tensor]:
    """All digits as the vision tower sees them.

    Returns:
        Pixels, ``[images, 3, 16, 16]`` and float32, and the digits that they show, ``[images]`` and int64.
    """
    images, labels = load_digits()
    pictures = [as_picture(values).convert("RGB") for values in images]
    pixels: Tensor = image_processor()(pictures, return_tensors="pt")["pixel_values"]
    return pixels, torch.from_numpy(labels)


def patch_features(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """What LLaVA takes of the tower, ``[images, 4, hidden]``: every patch of the last layer, not the class token."""
    features: Tensor = tower(pixel_values=pixels).last_hidden_state[:, 1:]
    return features


def _batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Numbers of the images of one batch after the other, in a new order in every pass, without end."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count - count % size].split(size) if count >= size else [order]


def _shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Moves every image by up to one pixel of its original 8×8 in each direction."""
    step = IMAGE_SIDE // 8
    margin = step * _LARGEST_SHIFT
    padded = functional.pad(pixels, (margin,) * 4, value=-1.0)
    corners = torch.randint(0, 2 * _LARGEST_SHIFT + 1, (len(pixels), 2), generator=generator) * step
    return torch.stack(
        [
            image[:, top : top + IMAGE_SIDE, left : left + IMAGE_SIDE]
            for image, (top, left) in zip(padded, corners.tolist(), strict=True)
        ]
    )


def train_tower(folder: Path, settings: Settings) -> str:
    """Train the vision tower as a classifier of the training digits and write it; the classifier's head is dropped.

    Args:
        folder: Existing folder.
        settings: Size of the tower and length of the training.

    Returns:
        How many held-out digits it tells, in words.
    """
    pixels, labels = load_pixels()
    train, held_out = split_images(len(labels))
    config = CLIPVisionConfig(
        hidden_size=settings.hidden_size,
        intermediate_size=4 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        image_size=IMAGE_SIDE,
        patch_size=PATCH_SIZE,
        hidden_act="quick_gelu",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = CLIPVisionModel(config)
        head = nn.Sequential(nn.LayerNorm(settings.hidden_size), nn.Linear(settings.hidden_size, 10))
    generator = torch.Generator().manual_seed(0)
    steps = max(1, settings.tower_epochs * len(train) // _TOWER_BATCH)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps + 1, pct_start=0.1)
    own, targets = pixels[train], labels[train]
    tower.train()
    for _, chosen in zip(range(steps), _batches(len(own), _TOWER_BATCH, generator), strict=False):
        scores = head(patch_features(tower, _shifted(own[chosen], generator)))
        # Every patch has to tell the digit by itself, as the language model sees each as a token.
        loss = functional.cross_entropy(scores.flatten(0, 1), targets[chosen].repeat_interleave(IMAGE_TOKENS))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    tower.eval()
    with torch.no_grad():
        told = head(patch_features(tower, pixels[held_out])).mean(dim=1).argmax(dim=-1) == labels[held_out]
    tower.save_pretrained(folder)
    return f"{100 * told.float().mean():.1f} % of the held-out digits told"


def make_processor(language_model: Path) -> LlavaProcessor:
    """The language model's tokenizer with a token for images and a chat template, and the image processor."""
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    template = CHAT_TEMPLATE.replace("end_of_turn", repr(tokenizer.eos_token))
    tokenizer.chat_template = template
    return LlavaProcessor(
        image_processor(),
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=template,
    )


def assemble(tower_folder: Path, language_model: Path, tokenizer: Any) -> LlavaForConditionalGeneration:
    """Join the vision tower and the language model by a projector with random weights.

    Args:
        tower_folder: What :func:`train_tower` has written.
        language_model: Folder of the language model.
        tokenizer: Its tokenizer, with the token for images.

    Returns:
        The model, in float32 and evaluation mode.
    """
    tower = CLIPVisionModel.from_pretrained(tower_folder, dtype=torch.float32)
    language = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if len(tokenizer) > language.get_input_embeddings().num_embeddings:
            language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        config = LlavaConfig(
            vision_config=tower.config,
            text_config=language.config,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            image_seq_length=IMAGE_TOKENS,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=language.config.tie_word_embeddings,
        )
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.requires_grad_(False).eval()


def train_model(folder: Path, tower_folder: Path, settings: Settings) -> str:
    """Train the projector and write the model with its processor, as any LLaVA folder.

    The tower and the language model are frozen, and images go through the tower once. The projector is first
    brought near the embeddings of the digits' names, in seconds, and then trained in front of the language model.

    Args:
        folder: Existing folder.
        tower_folder: What :func:`train_tower` has written.
        settings: Length of the training.

    Returns:
        The loss that is left, in words.
    """
    processor = make_processor(settings.language_model)
    tokenizer = processor.tokenizer
    model = assemble(tower_folder, settings.language_model, tokenizer)
    pixels, labels = load_pixels()
    train, _ = split_images(len(labels))
    with torch.no_grad():
        features = patch_features(model.model.vision_tower, pixels[train])
    names = torch.tensor([tokenizer(str(digit), add_special_tokens=False)["input_ids"][-1] for digit in range(10)])
    generator = torch.Generator().manual_seed(0)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    _align(projector, features, model.get_input_embeddings()(names)[labels[train]], settings, generator)
    loss = _train_projector(model, tokenizer, features, names[labels[train]], settings, generator)
    # In half precision, like the language model's own file; the configuration names the type to load it in.
    model.half().save_pretrained(folder)
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return f"{loss:.3f} nats per token left on training images"


def _align(
    projector: nn.Module, features: Tensor, targets: Tensor, settings: Settings, generator: torch.Generator
) -> None:
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3)
    batches = _batches(len(features), _ALIGNMENT_BATCH, generator)
    for _, chosen in zip(range(settings.alignment_steps), batches, strict=False):
        difference = projector(features[chosen]) - targets[chosen, None]
        optimizer.zero_grad()
        (difference.square().mean() / targets.var()).backward()
        optimizer.step()


def _train_projector(
    model: LlavaForConditionalGeneration,
    tokenizer: Any,
    features: Tensor,
    answers: Tensor,
    settings: Settings,
    generator: torch.Generator,
) -> float:
    """Trains the projector on "which digit" questions; returns the mean loss of the last steps."""
    projector, embed = model.model.multi_modal_projector, model.get_input_embeddings()
    question = torch.tensor(tokenizer(KINDS["digit"].question + "\n", add_special_tokens=False)["input_ids"])
    optimizer = torch.optim.AdamW(projector.parameters(), lr=5e-4)
    batches = _batches(len(features), settings.projector_batch_size, generator)
    losses = [float("nan")]
    for _, chosen in zip(range(settings.projector_steps), batches, strict=False):
        ends = torch.full((len(chosen),), tokenizer.eos_token_id)
        targets = torch.stack([answers[chosen], ends], dim=1)
        words = embed(torch.cat([question.expand(len(chosen), -1), targets[:, :1]], dim=1))
        inputs = torch.cat([projector(features[chosen]), words], dim=1)
        hidden = model.model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, -targets.shape[1] :])
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    last = losses[1:][-10:] or losses
    return sum(last) / len(last)
