"""A thousand odd data files: none is trained on as another text than is written, none gives a traceback.

``cd tests && python -m fuzz.data_files --files 1000``
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from fuzz.odd_files import END, START, OddFile, odd_files
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from module_helpers import END_OF_TURN, byte_tokenizer

from na_lora_lightning.data import InstructionDataModule
from na_lora_lightning.errors import ConfigurationError, DataError

assert END == END_OF_TURN
_LONGEST_SENTENCE = 1500


@dataclass
class Figures:
    """What became of the files."""

    files: int = 0
    records: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def show(self) -> str:
        """The figures as lines of text."""
        rows = [
            f"{self.files} files, {self.accepted.total()} accepted with {self.records} records, each trained on to the "
            f"letter; {self.reasons.total()} refused in one sentence; {len(self.failures)} failures",
            *(f"  {kind}: {self.accepted[kind]} of {count} accepted" for kind, count in sorted(self.formats.items())),
            *(f"  refused {count} times: {reason}" for reason, count in self.reasons.most_common()),
            *(f"FAILURE: {failure}" for failure in self.failures),
        ]
        return "\n".join(rows)


def check(odd: OddFile, folder: Path, figures: Figures) -> None:
    """Writes a file, prepares it for training, and compares the tokens with an independent reading of the file.

    Raises:
        AssertionError: They differ, or the file is refused in more than a sentence or without a reason.
    """
    folder.mkdir()
    source = odd.write(folder)
    datamodule = InstructionDataModule("byte", train=source, max_length=1 << 20, use_chat_template=odd.has_messages)
    datamodule._tokenizer = _TOKENIZER
    figures.files += 1
    figures.formats[odd.kind] += 1
    try:
        datamodule.prepare_data()
        datamodule.setup("fit")
    except (DataError, ConfigurationError) as error:
        sentence = str(error)
        assert "\n" not in sentence, sentence
        assert sentence.endswith("."), sentence
        assert len(sentence) < _LONGEST_SENTENCE, sentence
        assert not odd.is_sound, f"{odd} is sound and refused: {sentence}"
        figures.reasons[_reason(sentence)] += 1
        return
    expected = odd.read(source)
    assert expected is not None, f"{odd} is malformed and accepted"
    rows = datamodule._prepared_split("train")
    assert len(rows) == len(expected), (len(rows), len(expected), odd)
    for row, pieces in zip(rows, expected, strict=True):
        assert row["input_ids"] == _ids("".join(text for text, _ in pieces)), odd
        kept = [label for label in row["labels"] if label != -100]
        assert kept == list(itertools.chain(*(_ids(text) for text, is_target in pieces if is_target))), odd
    figures.accepted[odd.kind] += 1
    figures.records += len(rows)


def run(files: int, first_seed: int, figures: Figures, *, collect: bool = False) -> None:
    """Checks that many files, to the first failure or to the end."""
    numbers = itertools.count()
    with tempfile.TemporaryDirectory() as root:
        cache, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, Path(root) / "cache"

        @seed(first_seed)
        @settings(
            max_examples=files, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
        )
        @given(st.data())
        def examine(data: st.DataObject) -> None:
            folder, odd = Path(root) / f"{next(numbers)}", data.draw(odd_files())
            try:
                check(odd, folder, figures)
            except Exception as error:
                if not collect:
                    raise
                figures.failures.append(f"{type(error).__name__}: {error} {odd}")
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                shutil.rmtree(Path(root) / "cache", ignore_errors=True)

        try:
            examine()
        finally:
            datasets.config.HF_DATASETS_CACHE = cache


def _ids(text: str) -> list[int]:
    return _TOKENIZER(text, add_special_tokens=False)["input_ids"]


def _reason(sentence: str) -> str:
    """What is the same in sentences about the same."""
    sentence = re.sub(r"'.*?'(?=[ ,;.)])", "'…'", sentence)
    sentence = re.sub(r"\(.*\)", "(…)", sentence)
    return re.sub(r"0x\w+|\d+", "N", sentence).partition(";")[0]


_TOKENIZER: Any = byte_tokenizer(additional_special_tokens=[START])


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    figures, begin = Figures(), time.perf_counter()
    run(arguments.files, arguments.seed, figures, collect=True)
    print(figures.show())
    print(f"{time.perf_counter() - begin:.0f} s")
    sys.exit(bool(figures.failures))


if __name__ == "__main__":
    main()
