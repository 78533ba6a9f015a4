"""The quick start's records: riddles, split so that a held-out riddle cannot be answered from memory.

The task is the "Alice in Wonderland" riddle (Nezhurina et al., 2024): *"Mary has 3 brothers and she also has
2 sisters. How many sisters does Mary's brother have?"* The brother's sisters are Mary's and Mary herself, so
the answer is 3. Such riddles trip up language models far larger than this one. No pair of counts of a
held-out riddle occurs in any training riddle: what is learnt has to be the rule.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from pathlib import Path

from pretrained import QuickstartError

LARGEST_COUNT = 12
HELD_OUT_PAIRS = 36
SPLIT_SEED = 5
# Riddle number i of a stream is drawn from seed + i, so streams must start far apart.
TRAIN_SEED = 1
HELD_OUT_SEED = 10_000_019

Pair = tuple[int, int]
Record = dict[str, str]


def held_out_pairs() -> frozenset[Pair]:
    """Choose the pairs of counts that only held-out riddles use.

    Returns:
        ``HELD_OUT_PAIRS`` of the pairs of counts from 1 to ``LARGEST_COUNT``, always the same.
    """
    numbers = range(1, LARGEST_COUNT + 1)
    pairs: list[Pair] = list(itertools.product(numbers, numbers))
    random.Random(SPLIT_SEED).shuffle(pairs)
    return frozenset(pairs[:HELD_OUT_PAIRS])


def counts(question: str) -> Pair:
    """Read the two counts of a riddle, in the order in which it names them.

    Args:
        question: A riddle.

    Returns:
        Its two counts.
    """
    first, second = map(int, re.findall(r"\d+", question))
    return first, second


def _is_sound(question: str) -> bool:
    """Tell whether a riddle introduces the person that it asks about (one of the source's templates does not)."""
    asked = re.search(r"does (\w+)'s brother", question)
    return asked is None or question.startswith(asked[1] + " ")


def build_records(seed: int, size: int, held_out: bool) -> list[Record]:
    """Draw different riddles of one side of the split.

    Args:
        seed: Where the stream of riddles starts.
        size: How many riddles to return.
        held_out: Whether the pairs of counts are the held-out ones, or all others.

    Returns:
        Records with the riddle as ``prompt`` and the number as ``completion``.

    Raises:
        QuickstartError: There are not so many different riddles, or package ``reasoning-gym`` is missing.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise QuickstartError(
            "The riddles cannot be made because package reasoning-gym is not installed: "
            "pip install 'na-lora-lightning[quickstart]'."
        ) from error
    attempts = 100 * size
    riddles = reasoning_gym.create_dataset(
        "aiw", seed=seed, size=attempts, max_entities=LARGEST_COUNT, task_type_weights=[0.5, 0.5, 0.0]
    )
    kept_apart = held_out_pairs()
    records: dict[str, Record] = {}
    for index in range(attempts):
        if len(records) == size:
            break
        riddle = riddles[index]
        question = riddle["question"]
        if (counts(question) in kept_apart) == held_out and _is_sound(question):
            records.setdefault(question, {"prompt": question, "completion": riddle["answer"]})
    if len(records) < size:
        raise QuickstartError(
            f"{size} riddles were asked for, but only {len(records)} different ones were found: ask for fewer."
        )
    return list(records.values())


def write_jsonl(path: Path, records: list[Record]) -> None:
    """Write records one a line; the file appears complete or not at all.

    Args:
        path: File to write; its folder is made if it is not there.
        records: Records to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    os.replace(partial, path)


def write_data(folder: Path, train_size: int, held_out_size: int) -> tuple[Path, Path]:
    """Write the training and the held-out records.

    Args:
        folder: Folder to write to.
        train_size: Number of training records.
        held_out_size: Number of held-out records.

    Returns:
        The two files: training, held out.

    Raises:
        QuickstartError: A question would be on both sides.
    """
    held_out = build_records(HELD_OUT_SEED, held_out_size, held_out=True)
    train = build_records(TRAIN_SEED, train_size, held_out=False)
    # True by construction; checked all the same, since the whole measurement rests on it.
    if {record["prompt"] for record in train} & {record["prompt"] for record in held_out}:
        raise QuickstartError("The split was refused because a held-out riddle is also a training riddle.")
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    write_jsonl(paths[0], train)
    write_jsonl(paths[1], held_out)
    return paths
