"""Which records are trained on: those that are not too long, of several sources, without those for validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from module_helpers import private_dataset_cache, saved_tokenizer, write_jsonl  # noqa: F401

from na_lora_lightning.data import InstructionDataModule, LeftOutRecordsWarning, TruncationWarning
from na_lora_lightning.data.text.extent import require_positions
from na_lora_lightning.errors import ConfigurationError, DataError

pytestmark = pytest.mark.usefixtures("private_dataset_cache")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat_template=None)


def set_up(tokenizer: str, train: Any, stage: str = "fit", **options: Any) -> InstructionDataModule:
    module = InstructionDataModule(tokenizer, train=train, **options)
    module.setup(stage)
    return module


def prompts_of(module: InstructionDataModule, split: str = "train") -> list[str]:
    """What comes before the answers of prepared records, in their order."""
    return [
        module.tokenizer.decode([i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100])
        for row in module._prepared[split]
    ]


LONG = [{"prompt": letter * length, "completion": "."} for letter, length in (("a", 3), ("b", 9), ("c", 2), ("d", 8))]


def test_records_that_are_too_long(tokenizer: str, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", LONG)
    are_long = rf"^2 of 4 records of '{data}' have more tokens than max_length=9 and"
    with pytest.raises(DataError, match="keeps nothing of its completion when its 11 tokens are cut to max_length=9"):
        set_up(tokenizer, data, max_length=9)
    with pytest.raises(
        DataError, match=r"^record 2 of '.*' has 11 tokens, more than max_length=9; raise max_length, s"
    ):
        set_up(tokenizer, data, max_length=9, too_long="error")
    with pytest.warns(LeftOutRecordsWarning, match=f"{are_long} are left out; raise max_length or shorten them"):
        left = set_up(tokenizer, data, max_length=9, too_long="leave_out")
    assert prompts_of(left) == ["aaa", "cc"]
    assert (left.describe()["train"].tokens, left.describe()["train"].truncated) == (5 + 4, 0)
    with pytest.warns(TruncationWarning, match=r"^1 of 4 records of .* max_length=10 and were cut; raise"):
        cut = set_up(tokenizer, data, max_length=10)
    assert prompts_of(cut)[1] == "b" * 9
    with pytest.raises(DataError, match=r"^4 of 4 records of '.*' have more tokens than max_length=3, so that none is"):
        set_up(tokenizer, data, max_length=3, too_long="leave_out")
    with pytest.raises(ConfigurationError, match="too_long='drop' is unknown; set it to 'error', 'truncate' or 'leave"):
        set_up(tokenizer, data, too_long="drop")


@pytest.mark.parametrize("split", ["validation", "predict"])
def test_records_for_evaluation_that_are_too_long(split: str, tokenizer: str, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", LONG)
    stage = {"validation": "validate", "predict": "predict"}[split]
    with pytest.warns(LeftOutRecordsWarning, match=r"^\d of 4 records of .* are left out"):
        left = set_up(tokenizer, None, stage, max_length=7, too_long="leave_out", **{split: data})
    assert left._prepared[split]["prompt"][:] == ["aaa", "cc"]


class Limits:
    positions = (4, "n_positions")

    def usable_length(self, length: int) -> int:
        return min(length, 4)

    def describe_positions(self) -> str:
        return "the model has 4 positions"


def test_records_keep_their_numbers_when_others_are_left_out(tokenizer: str, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", [LONG[1], LONG[0], LONG[2]])
    with pytest.warns(LeftOutRecordsWarning):
        left = set_up(tokenizer, data, max_length=9, too_long="leave_out")
    limits: Any = Limits()
    with pytest.raises(DataError, match=r"^record 2 of 'x' has 5 tokens, and the model has 4 positions; set"):
        require_positions(left._prepared["train"], "x", limits, pad_to_multiple_of=1, max_new_tokens=0)
