"""Writes the tasks of the comparison on real weights: ``python -m benchmarks.real_weights.prepare``.

Each task is a folder with ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` below ``.cache/real_weights``, made
of what installed packages hold, by a fixed seed: no record of validation or test is among those of training.

* ``spell`` — a word spelt backward (reasoning-gym)
* ``sort`` — words in ascending or descending order (reasoning-gym)
* ``code`` — the body of a function of an installed package, after its head and docstring
* ``explain`` — what a message of Perl's means, in the words of its manual
* ``riddles`` — brothers and sisters, 128 records of which every fifth has a wrong answer in training (reasoning-gym)
"""

from __future__ import annotations

import ast
import json
import random
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.study.tasks.corpus import syntax_trees

Record = dict[str, str]

OUTPUT = Path(".cache/real_weights")
SIZES = {"train": 384, "validation": 64, "test": 128}
_LONGEST_BODY, _LONGEST_EXPLANATION, _LONGEST_HEAD = 220, 260, 300
_NOISY_RECORDS, _WRONG_EVERY = 128, 5


def _gym(name: str, count: int, **options: object) -> Iterator[Record]:
    import reasoning_gym

    for entry in reasoning_gym.create_dataset(name, size=count, seed=11, **options):
        yield {"prompt": entry["question"], "completion": entry["answer"], "_": entry["metadata"]}


def spell() -> Iterator[Record]:
    for record in _gym("spell_backward", 4000, min_word_len=5):
        yield {"prompt": record["prompt"].replace(" (example: sun -> nus)", ""), "completion": record["completion"]}


def sort() -> Iterator[Record]:
    for record in _gym("word_sorting", 2000, min_words=4, max_words=6, max_word_length=8):
        facts: dict = record["_"]  # type: ignore[assignment]
        prompt = f"Sort in {facts['direction']} order: {', '.join(facts['transformed_words'])}"
        yield {"prompt": prompt, "completion": record["completion"]}


def code() -> Iterator[Record]:
    trees = (
        each
        for package in ("lightning", "peft", "datasets", "jinja2", "torchmetrics", "optuna")
        for each in syntax_trees(package)
    )
    for source, tree in trees:
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or ast.get_docstring(node) is None or len(node.body) < 2:
                continue
            lines = source.splitlines()
            head = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.body[0].end_lineno]))
            body = "\n".join(lines[node.body[1].lineno - 1 : node.end_lineno])
            body = textwrap.indent(textwrap.dedent(body), "    ")
            if len(head) <= _LONGEST_HEAD and 40 <= len(body) <= _LONGEST_BODY:
                yield {"prompt": head + "\n", "completion": body}


def explain() -> Iterator[Record]:
    found = sorted(Path("/usr/share/perl").glob("*/pod/perldiag.pod"))
    if not found:
        sys.exit("error: the task 'explain' needs Perl's manual; install the package perl-modules.")
    entries = re.split(r"^=item ", found[-1].read_text(encoding="utf-8", errors="replace"), flags=re.MULTILINE)[1:]
    for entry in entries:
        title, _, rest = entry.partition("\n\n")
        paragraphs = [" ".join(_plain(part).split()) for part in rest.split("\n\n") if not part.startswith(("=", " "))]
        text = re.sub(r"^\([^)]*\) ", "", paragraphs[0]) if paragraphs else ""
        if len(text) >= 60 and len(title) < 120:
            sentences = re.split(r"(?<=[.?!]) ", text)
            kept = sentences[0]
            for sentence in sentences[1:]:
                kept = kept if len(kept) + len(sentence) > _LONGEST_EXPLANATION else f"{kept} {sentence}"
            yield {"prompt": f"Perl says: {' '.join(_plain(title).split())}", "completion": kept[:_LONGEST_EXPLANATION]}


def _plain(text: str) -> str:
    previous = ""
    while previous != text:
        previous, text = text, re.sub(r"[A-Z]<+ ?([^<>]*?) ?>+", r"\1", text)
    return text


def riddles() -> Iterator[Record]:
    for record in _gym("aiw", 6000, task_type_weights=[1.0, 0.0, 0.0]):
        yield {"prompt": f"{record['prompt']} Reply with one number.", "completion": record["completion"]}


TASKS: dict[str, Callable[[], Iterator[Record]]] = {
    "spell": spell,
    "sort": sort,
    "code": code,
    "explain": explain,
    "riddles": riddles,
}


def splits(task: str) -> dict[str, list[Record]]:
    """The records of a task by split, each prompt once in all of them."""
    records = list({record["prompt"]: record for record in TASKS[task]()}.values())
    draw = random.Random(f"{task}:7")
    draw.shuffle(records)
    sizes = {**SIZES, "train": _NOISY_RECORDS} if task == "riddles" else SIZES
    if len(records) < sum(sizes.values()):
        sys.exit(f"error: the task {task!r} has {len(records)} records and needs {sum(sizes.values())}.")
    found, start = {}, 0
    for split in ("test", "validation", "train"):
        found[split] = records[start : start + sizes[split]]
        start += sizes[split]
    if task == "riddles":
        for record in found["train"][::_WRONG_EVERY]:
            record["completion"] = str((int(record["completion"]) + draw.choice((1, 2, 3, 4))) % 10)
    return found


def main() -> None:
    for task in TASKS:
        folder = OUTPUT / task
        folder.mkdir(parents=True, exist_ok=True)
        for split, records in splits(task).items():
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{task}: {', '.join(f'{len(records)} {split}' for split, records in splits(task).items())}")


if __name__ == "__main__":
    main()
