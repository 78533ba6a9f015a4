"""The base models, shipped as a zip of each folder, and what they read: token ids, pixels and padded batches."""

from __future__ import annotations

import copy
import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image as Pictures
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils.logging import disable_progress_bar

from benchmarks.study import StudyError
from benchmarks.study.tasks.sources import Example, Image

FOLDER = Path(".cache/study/models")
# Another machine's processor would pretrain others, bit for bit.
SHIPPED = Path(__file__).parents[1] / "models"
_HELD_OUT_WINDOWS = 32
# The models see an image enlarged to this factor, so that the patches of their towers are not of very few pixels.
_ENLARGED = 2
IGNORED = -100


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of all parameters and buffers, by name."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode())
        total.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def take_shipped(folder: Path) -> bool:
    """Unpacks the model of a folder's name, if the project ships it, whole or not at all.

    Args:
        folder: Where the model should be; one that exists is left alone.

    Returns:
        Whether it was unpacked.
    """
    shipped = SHIPPED / f"{folder.name}.zip"
    if folder.exists() or not shipped.is_file():
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as scratch:
        shutil.unpack_archive(shipped, partial := Path(scratch) / folder.name)
        # Another process may have been faster.
        with suppress(OSError):
            partial.rename(folder)
    return True


@lru_cache(maxsize=2)
def base_model(folder: str) -> tuple[PreTrainedModel, Any, str]:
    """Base model on the CPU, its tokenizer (its processor where it takes images) and digest of the weights."""
    if Path(folder).parent == FOLDER:
        take_shipped(Path(folder))
    if not (Path(folder) / "config.json").is_file():
        names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.zip")))
        raise StudyError(f"there is no model in {folder!r}; those of the study are {names}.")
    disable_progress_bar()
    takes_images = getattr(AutoConfig.from_pretrained(folder), "vision_config", None) is not None
    kind = AutoModelForImageTextToText if takes_images else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32)
    processor = (AutoProcessor if takes_images else AutoTokenizer).from_pretrained(folder)
    return model, processor, weights_digest(model)


def fresh_model(folder: str) -> PreTrainedModel:
    """A copy of a base model that a cell may change."""
    return copy.deepcopy(base_model(folder)[0])


def held_out_windows(folder: str) -> Tensor:
    """Windows of held-out documentation, ``[32, 128]``, on which forgetting is measured."""
    windows: Tensor = torch.load(Path(folder) / "held_out.pt", weights_only=True)
    return windows[:_HELD_OUT_WINDOWS]


class Encoded(NamedTuple):
    """An example as a model takes it.

    Attributes:
        ids: Token ids of prompt, answer and end.
        prompt: How many of them are prompt.
        pixels: ``[images, channels, height, width]`` float32 in the order of the images; None without images.
    """

    ids: list[int]
    prompt: int
    pixels: Tensor | None = None


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor for text and images; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


def encode(processor: Any, examples: Sequence[Example], max_length: int) -> list[Encoded]:
    """Token ids of prompt, answer and end, how many of them are prompt, and pixels.

    A longer example loses the start of its prompt, or, where it has none, its end.

    Args:
        processor: A tokenizer, or the processor of a model that takes images.
        examples: The examples.
        max_length: Tokens that an example may have.

    Raises:
        StudyError: An example has images and the model takes none, or its prompt with images is too long.
    """
    tokenizer = tokenizer_of(processor)
    encoded = []
    for example in examples:
        prompt, pixels = _prompt_of(processor, example)
        answer = [*tokenizer(example.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        answer = answer[: max_length - 1]
        room = max_length - len(answer)
        if pixels is not None and len(prompt) > room:
            raise StudyError(
                f"an example with {len(pixels)} images has {len(prompt)} tokens before its answer, of which no image "
                f"can be cut; raise max_length, which is {max_length}."
            )
        prompt = prompt[-room:]
        encoded.append(Encoded([*prompt, *answer], len(prompt), pixels))
    return encoded


def _prompt_of(processor: Any, example: Example) -> tuple[list[int], Tensor | None]:
    """Token ids of the images, each as many as the model takes for it, and of the prompt; and pixels."""
    tokenizer = tokenizer_of(processor)
    if example.images and not hasattr(processor, "image_processor"):
        raise StudyError("the task has images and the model takes none; choose a model with a vision tower.")
    text = (processor.image_token * len(example.images) if example.images else "") + example.prompt
    start = [tokenizer.bos_token_id]
    if not example.images:
        return [*start, *tokenizer(text, add_special_tokens=False)["input_ids"]], None
    pictures = [as_picture(image) for image in example.images]
    made = processor(text=text, images=pictures, add_special_tokens=False, return_tensors="pt")
    return [*start, *made["input_ids"][0].tolist()], made["pixel_values"]


def collate(encoded: Sequence[Encoded], padding: int) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, longest]`` int64, padded on the right.

    Labels are -100 on the prompt and on padding. Where there are images, ``pixel_values`` are those of all examples
    one after the other, ``[images, channels, height, width]`` float32, as the model's image tokens come.
    """
    longest = max(len(entry.ids) for entry in encoded)
    ids = torch.full((len(encoded), longest), padding)
    mask = torch.zeros((len(encoded), longest), dtype=torch.long)
    labels = torch.full((len(encoded), longest), IGNORED)
    for row, (tokens, prompt, _) in enumerate(encoded):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    pixels = [entry.pixels for entry in encoded if entry.pixels is not None]
    if pixels:
        batch["pixel_values"] = torch.cat(pixels)
    return batch


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch without its labels."""
    return {name: values for name, values in batch.items() if name != "labels"}


def as_picture(image: Image) -> Pictures.Image:
    """An image as processors take it: enlarged, in red, green and blue."""
    grey = Pictures.fromarray(np.array(image, dtype=np.uint8))
    size = (_ENLARGED * grey.width, _ENLARGED * grey.height)
    return grey.resize(size, Pictures.Resampling.BILINEAR).convert("RGB")
