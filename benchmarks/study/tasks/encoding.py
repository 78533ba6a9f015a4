"""Examples as token ids and pixels, and padded batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.study import StudyError
from benchmarks.study.tasks.examples import Example
from benchmarks.study.tasks.pictures import as_picture

IGNORED = -100


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

    A tokenizer with a chat template is given the prompt as a user's turn. A longer example loses the start of its
    prompt, or, where it has none, its end.

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
        text = example.answer.lstrip() if example.prompt and tokenizer.chat_template else example.answer
        answer = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
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
    takes_images = hasattr(processor, "image_processor")
    if example.images and not takes_images:
        raise StudyError("the task has images and the model takes none; choose a model with a vision tower.")
    start: list[int] = []
    if example.prompt and tokenizer.chat_template:
        parts = [*({"type": "image"} for _ in example.images), {"type": "text", "text": example.prompt}]
        turn = [{"role": "user", "content": parts if takes_images else example.prompt}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    else:
        start = [tokenizer.bos_token_id]
        text = (processor.image_token * len(example.images) if example.images else "") + example.prompt
    if not example.images:
        return [*start, *tokenizer(text, add_special_tokens=False)["input_ids"]], None
    pictures = [as_picture(image) for image in example.images]
    made = processor(text=text, images=pictures, add_special_tokens=False, return_tensors="pt")
    return [*start, *made["input_ids"][0].tolist()], made["pixel_values"]


def collate(
    encoded: Sequence[Encoded],
    padding: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, longest]`` int64, padded on the right.

    Labels are -100 on the prompt and on padding. Where there are images, ``pixel_values`` are those of all examples
    one after the other, ``[images, channels, height, width]`` in ``dtype``, as the model's image tokens come.
    """
    longest = max(len(entry.ids) for entry in encoded)
    ids = torch.full((len(encoded), longest), padding)
    mask = torch.zeros((len(encoded), longest), dtype=torch.long)
    labels = torch.full((len(encoded), longest), IGNORED)
    for row, (tokens, prompt, _) in enumerate(encoded):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
    batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}
    pixels = [entry.pixels for entry in encoded if entry.pixels is not None]
    if pixels:
        batch["pixel_values"] = torch.cat(pixels).to(device, dtype)
    return batch


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch without its labels."""
    return {name: values for name, values in batch.items() if name != "labels"}
