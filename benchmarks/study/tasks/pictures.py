"""Questions about pictures: one or two of scikit-learn's handwritten digits, 1,797 real images of 8 × 8 pixels.

Images are split before questions are made, so that a question for validation or test shows handwriting that neither
the training questions nor the pretraining of the vision tower have shown.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image as Pictures

from benchmarks.study import StudyError
from benchmarks.study.tasks.examples import Example, Image

# The models see an image enlarged to this factor, so that the patches of their towers are not of very few pixels.
ENLARGED = 2
# In the order of parts_of_images these are the images that examples/vlm_digits holds out, so that the vision tower that
# it trains has not seen them either.
_HELD_OUT_IMAGES = {"test": 250, "valid": 147}
_LARGEST_GREY = 16


@dataclass(frozen=True)
class Question:
    """A kind of question.

    Attributes:
        text: The question.
        images: How many images it is about.
        answer: Makes the answer from the digits that they show.
    """

    text: str
    images: int
    answer: Callable[..., str]


QUESTIONS = {
    "digit": Question("Which digit?", 1, str),
    "parity": Question("Even or odd?", 1, lambda digit: "odd" if digit % 2 else "even"),
    "sum": Question("Their sum?", 2, lambda first, second: str(first + second)),
    "larger": Question("The larger?", 2, lambda first, second: str(max(first, second))),
}


@cache
def digits() -> tuple[tuple[Image, ...], tuple[int, ...]]:
    """All images, and the digit that each shows."""
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    greys = (values.reshape(-1, 8, 8) * (255 / _LARGEST_GREY)).round().astype(int)
    return tuple(tuple(map(tuple, image)) for image in greys.tolist()), tuple(labels.tolist())


def parts_of_images(count: int) -> dict[str, list[int]]:
    """Numbers of the images of ``train``, ``valid`` and ``test``, always the same."""
    order = list(range(count))
    random.Random(0).shuffle(order)
    parts = {}
    for name, size in _HELD_OUT_IMAGES.items():
        parts[name], order = order[:size], order[size:]
    return parts | {"train": order}


def pictured_digits(questions: Sequence[str], train: int, held_out: int) -> dict[str, list[Example]]:
    """Different questions about the images of each part, the kinds of question in equal shares.

    Args:
        questions: Names in :data:`QUESTIONS`.
        train: Number of questions that training sets are drawn from.
        held_out: Number of questions for validation, and of those for the test.

    Returns:
        ``train``, ``valid`` and ``test``.

    Raises:
        StudyError: A kind of question is unknown, or there are too few images for so many questions.
    """
    unknown = [name for name in questions if name not in QUESTIONS]
    if unknown:
        raise StudyError(f"the question {unknown[0]!r} does not exist; choose among {', '.join(QUESTIONS)}.")
    images, labels = digits()
    found = {}
    for part, numbers in parts_of_images(len(images)).items():
        wanted = train if part == "train" else held_out
        if wanted > len(questions) * len(numbers):
            raise StudyError(
                f"{wanted} questions are wanted of the part {part!r} of the digits, which has {len(numbers)} images; "
                f"ask for {len(questions) * len(numbers)} at most."
            )
        found[part] = _questions_of(numbers, images, labels, questions, wanted, part)
    return found


def _questions_of(
    numbers: Sequence[int],
    images: Sequence[Image],
    labels: Sequence[int],
    questions: Sequence[str],
    wanted: int,
    seed: str,
) -> list[Example]:
    draw = random.Random(seed)
    found: list[Example] = []
    seen: set[tuple[str, ...]] = set()
    while len(found) < wanted:
        name = questions[len(found) % len(questions)]
        question = QUESTIONS[name]
        chosen = draw.sample(numbers, question.images)
        shown = [labels[number] for number in chosen]
        # Of two equal digits none is the larger.
        if (name == "larger" and shown[0] == shown[1]) or (name, *map(str, chosen)) in seen:
            continue
        seen.add((name, *map(str, chosen)))
        found.append(Example(question.text, question.answer(*shown), tuple(images[number] for number in chosen)))
    return found


def as_picture(image: Image) -> Pictures.Image:
    """An image as processors take it: enlarged, in red, green and blue."""
    grey = Pictures.fromarray(np.array(image, dtype=np.uint8))
    size = (ENLARGED * grey.width, ENLARGED * grey.height)
    return grey.resize(size, Pictures.Resampling.BILINEAR).convert("RGB")
