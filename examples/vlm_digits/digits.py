"""Scikit-learn's handwritten digits, and questions that take one or two of them to answer.

The 1,797 images of 8×8 pixels are split by image before any question is made, so a held-out question shows
handwriting that neither the vision tower nor the projector nor LoRA has seen.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from settings import ExampleError

IMAGE_SIDE = 16
HELD_OUT_IMAGES = 397
SPLIT_SEED = 0
TRAIN_SEED, HELD_OUT_SEED = 1, 2
# What is hardest is asked twice as often in training.
TRAIN_KINDS = ("digit", "parity", "sum", "larger", "sum")
_LARGEST_GREY = 16


@dataclass(frozen=True)
class Kind:
    """A kind of question.

    Attributes:
        question: The question.
        images: How many images it is about.
        answer: Makes the answer from the digits that the images show.
    """

    question: str
    images: int
    answer: Callable[..., str]


KINDS = {
    "digit": Kind("Which digit?", 1, str),
    "parity": Kind("Even or odd?", 1, lambda digit: "odd" if digit % 2 else "even"),
    "sum": Kind("Their sum?", 2, lambda first, second: str(first + second)),
    "larger": Kind("The larger?", 2, lambda first, second: str(max(first, second))),
}


@dataclass(frozen=True)
class Question:
    """A record of the data module, and the kind of question that it is.

    Attributes:
        kind: A name in ``KINDS``.
        images: Files of the images, relative to the folder of the records.
        prompt: The question.
        completion: The answer.
    """

    kind: str
    images: list[str]
    prompt: str
    completion: str


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Load the digits.

    Returns:
        Grey values, ``[images, 8, 8]`` and uint8, and the digits that they show, ``[images]`` and int64.

    Raises:
        ExampleError: Package ``scikit-learn`` is missing.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ExampleError(
            "The digits cannot be loaded because package scikit-learn is not installed: pip install scikit-learn."
        ) from error
    digits = datasets.load_digits()
    return (digits.images * (255 / _LARGEST_GREY)).round().astype(np.uint8), digits.target.astype(np.int64)


def as_picture(values: np.ndarray) -> Image.Image:
    """Turn grey values ``[8, 8]`` into the picture that models and people see: larger, and white on black."""
    return Image.fromarray(values).resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BILINEAR)


def split_images(count: int) -> tuple[list[int], list[int]]:
    """Split images into those to train on and those held out, always in the same way.

    Args:
        count: How many images there are.

    Returns:
        Numbers of the training images and of the held-out ones.
    """
    order = list(range(count))
    random.Random(SPLIT_SEED).shuffle(order)
    return sorted(order[HELD_OUT_IMAGES:]), sorted(order[:HELD_OUT_IMAGES])


def make_questions(
    labels: Sequence[int], pool: Sequence[int], count: int, seed: int, names: Sequence[str] = tuple(KINDS)
) -> list[Question]:
    """Draw different questions about images of a pool, one kind after the other.

    Args:
        labels: The digit of every image.
        pool: Numbers of the images to ask about.
        count: How many questions to draw.
        seed: Seed of the draw.
        names: The kinds of one round of questions.

    Returns:
        The questions; the two digits of a question for the larger one differ.

    Raises:
        ExampleError: The pool is too small.
    """
    if count // len(names) >= len(pool):
        raise ExampleError(
            f"{count} questions need more than the {len(pool)} images there are: ask for fewer than "
            f"{len(names) * len(pool)}."
        )
    draw = random.Random(seed)
    questions: list[Question] = []
    seen: set[tuple[str, ...]] = set()
    while len(questions) < count:
        name = names[len(questions) % len(names)]
        kind = KINDS[name]
        chosen = draw.sample(list(pool), kind.images)
        digits = [int(labels[number]) for number in chosen]
        files = [image_file(number) for number in chosen]
        if (name == "larger" and digits[0] == digits[1]) or (name, *files) in seen:
            continue
        seen.add((name, *files))
        questions.append(Question(name, files, kind.question, kind.answer(*digits)))
    return questions


def image_file(number: int) -> str:
    """Name of an image's file in the folder of the records."""
    return f"images/{number:04d}.png"


def read_questions(path: Path) -> list[Question]:
    """Read the questions of a file that :func:`write_data` has written."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Question(**json.loads(line)) for line in lines]


def write_data(folder: Path, train_count: int, held_out_count: int) -> str:
    """Write images, ``train.jsonl`` and ``held_out.jsonl``.

    Args:
        folder: Existing folder.
        train_count: Number of training questions.
        held_out_count: Number of held-out questions.

    Returns:
        What was written, in words.
    """
    images, labels = load_digits()
    (folder / "images").mkdir()
    for number, values in enumerate(images):
        as_picture(values).save(folder / image_file(number))
    train, held_out = split_images(len(images))
    splits = {
        "train": make_questions(labels.tolist(), train, train_count, TRAIN_SEED, TRAIN_KINDS),
        "held_out": make_questions(labels.tolist(), held_out, held_out_count, HELD_OUT_SEED),
    }
    for name, questions in splits.items():
        lines = [json.dumps(asdict(question)) + "\n" for question in questions]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return f"{train_count} training questions, {held_out_count} held out"
