"""What the tasks' examples are made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Rows of grey values from 0 (black) to 255.
Image = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Example:
    """A prompt, empty for plain text, and what is to be predicted after it.

    Attributes:
        prompt: The prompt.
        answer: What is predicted.
        images: Small grey images that the model sees before the prompt.
    """

    prompt: str
    answer: str
    images: tuple[Image, ...] = ()

    @classmethod
    def from_plain(cls, entry: Sequence[Any]) -> Example:
        """Reads what :meth:`plain` made, as JSON gives it back."""
        prompt, answer, *images = entry
        return cls(prompt, answer, *(tuple(tuple(map(tuple, image)) for image in some) for some in images))

    def plain(self) -> list[Any]:
        """Values that JSON can hold."""
        return [self.prompt, self.answer, *([self.images] if self.images else [])]

    def texts(self) -> list[str]:
        """What a digest is taken of: prompt and answer, and the images where there are some."""
        return [self.prompt, self.answer, *([json.dumps(self.images)] if self.images else [])]
