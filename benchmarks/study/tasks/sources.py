"""Where examples come from: text of installed packages, tables, images and verifiable puzzles."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.study.tasks import corpus
from benchmarks.study.tasks.examples import Example
from benchmarks.study.tasks.pictures import pictured_digits

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


def _reasoning(dataset: str, size: int, options: Mapping[str, Any]) -> list[Example]:
    """Puzzles of reasoning-gym, each question once."""
    import reasoning_gym

    made = reasoning_gym.create_dataset(dataset, size=size, seed=0, **options)
    answers = {item["question"].strip(): str(item["answer"]) for item in made if item["answer"] is not None}
    return [Example(f"{question}\nAnswer:", f" {answer}") for question, answer in answers.items()]


def _documentation() -> list[Example]:
    """Held-out text of the kind that the small models are pretrained on."""
    return [Example("", text) for text in corpus.pretraining_text()[1]]


SOURCES: dict[str, Callable[..., Pool]] = {
    "functions": _functions,
    "headers": _headers,
    "origin": _origin,
    "names": _names,
    "errors": _errors,
    "digits": _digits,
    "pictured_digits": pictured_digits,
    "tissue": _tissue,
    "reasoning": _reasoning,
    "documentation": _documentation,
}
_PACKAGES_OF = {
    "digits": ["sklearn"],
    "pictured_digits": ["sklearn"],
    "tissue": ["sklearn"],
    "reasoning": ["reasoning_gym"],
    "documentation": list(corpus.PRETRAINING_PACKAGES),
}


def packages_of(data: Mapping[str, Any]) -> dict[str, str]:
    """Versions of the packages that a task's examples come from."""
    options = data["source"]
    names = _PACKAGES_OF.get(options["kind"]) or options.get("packages") or [options["package"]]
    return corpus.versions_of(names)
