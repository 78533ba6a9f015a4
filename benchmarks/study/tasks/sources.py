"""Tasks: examples from installed packages, a table and images, and how a seed draws its training set from them.

The first examples of a source in a fixed random order are the test set and the validation set, the same for every seed.
A seed draws the training set, its label noise and the order of the batches from the rest, and nothing else does: all
arms of a seed see the same batches. Images are split before questions are made of them: a question for validation or
test shows handwriting that neither the training questions nor the pretraining of the vision tower have shown.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from benchmarks.study import StudyError
from benchmarks.study.tasks import corpus

PARTS = ("test", "valid", "train")
# In the order of parts_of_images these are the images that examples/vlm_digits holds out too.
_HELD_OUT_IMAGES = {"test": 250, "valid": 147}
_LARGEST_GREY = 16

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

    def texts(self) -> list[str]:
        """What a digest is taken of: prompt and answer, and the images where there are some."""
        return [self.prompt, self.answer, *([json.dumps(self.images)] if self.images else [])]


@dataclass(frozen=True)
class TaskData:
    """What a cell trains on and is scored on.

    Attributes:
        train: Drawn by the seed.
        valid: For choosing the learning rate, the same for every seed and without noise.
        test: For the score, likewise.
        sha256: Digest of the whole pool.
    """

    train: list[Example]
    valid: list[Example]
    test: list[Example]
    sha256: str


# All examples of a source, or those of each part where the source makes the parts.
Pool = list[Example] | dict[str, list[Example]]


def _functions(package: str) -> list[Example]:
    return [Example("", text) for text in corpus.functions(package)]


def _headers(package: str, folder: str) -> list[Example]:
    return [Example("", text) for text in corpus.header_pieces(package, folder)]


def _origin(packages: list[str], each: int) -> list[Example]:
    """Which package does the first paragraph of a docstring come from?"""
    found = []
    for package in packages:
        words = re.compile(re.escape(package), re.IGNORECASE)
        paragraphs = dict.fromkeys(" ".join(text.split("\n\n")[0].split()) for text in corpus.docstrings(package))
        usable = [text[:140] for text in paragraphs if len(text) >= 40 and not words.search(text)]
        random.Random(package).shuffle(usable)
        found += [Example(f"{text}\nPackage:", f" {package}") for text in usable[:each]]
    return found


def _names(packages: list[str]) -> list[Example]:
    """What is the function called that this sentence describes?"""
    pairs = dict(pair for package in packages for pair in corpus.named_functions(package))
    return [Example(f"{text[:140]}\nName:", f" {name}") for text, name in pairs.items()]


def _errors(packages: list[str], kinds: list[str], each: int) -> list[Example]:
    """Which exception is raised with this message? ``each`` messages of each kind."""
    raised = dict(pair for package in packages for pair in corpus.raised_messages(package))
    found = []
    for kind in kinds:
        messages = [message[:140] for message, name in raised.items() if name == kind]
        random.Random(kind).shuffle(messages)
        found += [Example(f"{message}\nError:", f" {kind}") for message in dict.fromkeys(messages)][:each]
    return found


def _tissue() -> list[Example]:
    """Is a tumour with these measurements malignant? Ten means of the real breast-cancer table of Wisconsin."""
    from sklearn.datasets import load_breast_cancer

    table = load_breast_cancer()
    names = [name.removeprefix("mean ") for name in table.feature_names[:10]]
    found = []
    for row, label in zip(table.data[:, :10], table.target, strict=True):
        measured = [f"{name} {value:.3g}" for name, value in zip(names, row, strict=True)]
        found.append(Example(", ".join(measured) + "\nTumour:", f" {table.target_names[label]}"))
    return found


def _digits() -> list[Example]:
    """Real 8 × 8 images of handwritten digits, drawn with five characters."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    shades = " .:+#"
    found = []
    for image, label in zip(images.reshape(-1, 8, 8), labels, strict=True):
        rows = ["".join(shades[min(4, int(value) // 4)] for value in row) for row in image]
        found.append(Example("\n".join(rows) + "\nDigit:", f" {label}"))
    return found


@dataclass(frozen=True)
class Question:
    """A kind of question: its text, how many images it is about, and the answer from the digits that they show."""

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
    """``train`` questions about images of training, ``held_out`` about those of validation and of the test each.

    All are different, the kinds of question in equal shares.
    """
    images, labels = digits()
    found = {}
    for part, numbers in parts_of_images(len(images)).items():
        wanted = train if part == "train" else held_out
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


SOURCES: dict[str, Callable[..., Pool]] = {
    "functions": _functions,
    "headers": _headers,
    "origin": _origin,
    "names": _names,
    "errors": _errors,
    "digits": _digits,
    "pictured_digits": pictured_digits,
    "tissue": _tissue,
}


def packages_of(data: Mapping[str, Any]) -> dict[str, str]:
    """Versions of the packages that a task's examples come from."""
    options = data["source"]
    return corpus.versions_of(options.get("packages") or [options.get("package", "sklearn")])


def _pool(source: Mapping[str, Any]) -> Pool:
    """All examples of a source, in a fixed random order."""
    options = dict(source)
    made = SOURCES[options.pop("kind")](**options)
    order = random.Random(0)
    for part in made.values() if isinstance(made, dict) else [made]:
        order.shuffle(part)
    return made


def _cut(examples: list[Example], data: Mapping[str, Any]) -> dict[str, list[Example]]:
    wanted = sum(data[part] for part in PARTS)
    if len(examples) < wanted:
        raise StudyError(
            f"the source {data['source']['kind']!r} has {len(examples)} examples and the task wants {wanted}; lower "
            "its train, valid or test size."
        )
    test, rest = examples[: data["test"]], examples[data["test"] :]
    return {"test": test, "valid": rest[: data["valid"]], "train": rest[data["valid"] :]}


def load(data: Mapping[str, Any], seed: int) -> TaskData:
    """The data of a cell.

    Args:
        data: ``source``, sizes ``train``, ``valid``, ``test``, and ``label_noise``, the share of training answers
            that are replaced by the answer of another class.
        seed: The cell's seed.

    Raises:
        StudyError: The pool is too small.
    """
    made = _pool(data["source"])
    parts = made if isinstance(made, dict) else _cut(made, data)
    for name, part in parts.items():
        if len(part) < data[name]:
            raise StudyError(
                f"the source {data['source']['kind']!r} has {len(part)} examples in its part {name!r} and the task "
                f"wants {data[name]}; lower its {name} size, or have the source make more."
            )
    whole = [example for part in PARTS for example in made[part]] if isinstance(made, dict) else made
    train = random.Random(f"{seed}:sample").sample(parts["train"], data["train"])
    return TaskData(
        with_label_noise(train, data.get("label_noise", 0.0), seed),
        parts["valid"][: data["valid"]],
        parts["test"][: data["test"]],
        corpus.digest(text for example in whole for text in example.texts()),
    )


def with_label_noise(train: list[Example], share: float, seed: int) -> list[Example]:
    """Replaces the answers of ``share`` of the examples, drawn by the seed, by another answer that occurs."""
    if share == 0.0:
        return train
    generator = random.Random(f"{seed}:noise")
    answers = sorted({example.answer for example in train})
    noisy = set(generator.sample(range(len(train)), round(share * len(train))))
    return [
        replace(example, answer=generator.choice([other for other in answers if other != example.answer]))
        if index in noisy
        else example
        for index, example in enumerate(train)
    ]


def batch_order(examples: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Indices of the examples of each step: one permutation after the other, cut into batches."""
    generator = random.Random(f"{seed}:order")
    stream: list[int] = []
    while len(stream) < batch_size * steps:
        stream += generator.sample(range(examples), examples)
    return [stream[step * batch_size : (step + 1) * batch_size] for step in range(steps)]
