"""Tasks: pools of examples from real text or verifiable puzzles, and how a seed draws its training set from them.

The first examples of a pool in a fixed random order are the test set and the validation set, the same for every seed.
A seed draws the training set, its label noise and the order of the batches from the rest, and nothing else does: all
arms of a seed see the same batches. A source whose examples share something (an image, say) makes its three parts
itself.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.study import StudyError
from benchmarks.study.tasks import corpus
from benchmarks.study.tasks.examples import Example
from benchmarks.study.tasks.sources import SOURCES, Pool, packages_of

CACHE = Path(".cache/study/pools")
PARTS = ("test", "valid", "train")


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


def pool(source: Mapping[str, Any]) -> Pool:
    """All examples of a source, in a fixed random order; kept in a cache for the installed versions.

    Raises:
        StudyError: There is no such source.
    """
    options = dict(source)
    kind = options.pop("kind")
    if kind not in SOURCES:
        raise StudyError(f"the task source {kind!r} does not exist; choose one of {', '.join(SOURCES)}.")
    key = json.dumps([source, packages_of({"source": source}), "1"], sort_keys=True)
    file = CACHE / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
    if file.is_file():
        return _each_part(json.loads(file.read_text()), lambda part: [Example.from_plain(entry) for entry in part])
    examples = SOURCES[kind](**options)
    _each_part(examples, random.Random(0).shuffle)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{random.SystemRandom().getrandbits(32)}")
    partial.write_text(json.dumps(_each_part(examples, lambda part: [example.plain() for example in part])))
    partial.replace(file)
    return examples


def _each_part(made: Any, function: Callable[[list[Any]], Any]) -> Any:
    """Calls a function with each part of what a source made, or with all of it where it has no parts."""
    return {name: function(part) for name, part in made.items()} if isinstance(made, dict) else function(made)


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
    made = pool(data["source"])
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
