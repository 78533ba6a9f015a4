"""A record with images, read as a conversation whose turns consist of parts."""

from __future__ import annotations

from typing import Any

from na_lora_lightning.data.text.records import Message, read_conversation
from na_lora_lightning.errors import DataError

Part = dict[str, Any]
# Where an image is in the texts of LLaVA.
_PLACE = "<image>"


def read_vision_conversation(record: dict[str, Any], images: int, *, needs_completion: bool) -> list[Message]:
    """Returns the turns of a record, each with a list of parts as its content.

    A part is ``{"type": "text", "text": ...}`` or ``{"type": "image"}``, which stands for the next image of the record.
    Where a record has no such part, its images come first in its first turn of the user.

    Args:
        record: The record; a turn's ``content`` may be text or a list of parts.
        images: How many images it has.
        needs_completion: Whether a record without completion is an error.

    Raises:
        DataError: The record cannot be used. The message lacks its subject, which the caller knows.
    """
    parts_of_turn: dict[int, list[Part]] = {}
    messages = record.get("messages")
    if isinstance(messages, list) and all(isinstance(turn, dict) for turn in messages):
        parts_of_turn = {
            index: _checked_parts(turn["content"], index + 1)
            for index, turn in enumerate(messages)
            if isinstance(turn.get("content"), list)
        }
        # All that is to be said about the turns is said about their texts.
        texts = [
            {**turn, "content": text_of(parts_of_turn[index])} if index in parts_of_turn else turn
            for index, turn in enumerate(messages)
        ]
        record = {**record, "messages": texts}
    conversation = read_conversation(record, needs_completion=needs_completion)
    turns = [
        {**turn, "content": parts_of_turn.get(index) or _text_part(turn["content"])}
        for index, turn in enumerate(conversation)
    ]
    return _with_images(turns, images)


def with_image_parts(turn: Any) -> Any:
    """A turn of ShareGPT, where LLaVA and those after it write ``<image>`` for an image, with a part in its place."""
    content = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(content, str) or _PLACE not in content:
        return turn
    first, *others = content.split(_PLACE)
    parts = [first, *(piece for other in others for piece in (None, other))]
    return {
        **turn,
        "content": [
            {"type": "image"} if part is None else {"type": "text", "text": part} for part in parts if part != ""
        ],
    }


def _text_part(content: str | None) -> list[Part]:
    # None is the content of a turn that calls tools.
    return [] if content is None else [{"type": "text", "text": content}]


def text_of(parts: list[Part]) -> str:
    """The text of a turn, without its images."""
    return "".join(part["text"] for part in parts if part["type"] == "text")


def count_images(messages: list[Message]) -> int:
    """How many images the turns have."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def _checked_parts(parts: list[Any], number: int) -> list[Part]:
    checked: list[Part] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            checked.append({"type": "text", "text": part["text"]})
        elif kind == "image" and not any(value is not None for key, value in part.items() if key != "type"):
            checked.append({"type": "image"})
        elif kind == "image":
            raise DataError(
                f"names an image inside message {number}; put it in 'images' and leave {{'type': 'image'}} in its "
                "place."
            )
        else:
            raise DataError(
                f"has a part in message {number} that is neither text nor an image; use {{'type': 'text', "
                "'text': ...} and {'type': 'image'}."
            )
    return checked


def _with_images(turns: list[Message], images: int) -> list[Message]:
    for number, turn in enumerate(turns, start=1):
        if turn["role"] == "assistant" and count_images([turn]):
            raise DataError(f"has an image in its answer (message {number}), where none can be learned; remove it.")
    placed = count_images(turns)
    if placed == 0 and images:
        first = next((index for index, turn in enumerate(turns) if turn["role"] == "user"), 0)
        parts = [{"type": "image"}] * images + turns[first]["content"]
        return [*turns[:first], {**turns[first], "content": parts}, *turns[first + 1 :]]
    if placed != images:
        raise DataError(
            f"has {images} {'image' if images == 1 else 'images'} and {placed} image parts in its messages; give one "
            "part for each image, or none at all."
        )
    return turns
