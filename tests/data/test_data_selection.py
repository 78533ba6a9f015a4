"""Which records are trained on: those that are not too long, of several sources, without those for validation."""

from __future__ import annotations

import logging
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
    rows, placeholders = 999, frozenset[int]()
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


def source_of(folder: Path, letter: str, count: int, **record: Any) -> str:
    rows = [{"prompt": letter * (1 + number), "completion": ".", **record} for number in range(count)]
    return write_jsonl(folder / f"{letter}.jsonl", rows)


def test_sources_without_weights_are_taken_whole_each_in_its_format(tokenizer: str, tmp_path: Path) -> None:
    plain = source_of(tmp_path, "a", 3)
    asked = write_jsonl(tmp_path / "q.jsonl", [{"q": "b", "completion": "."}, {"q": "bb", "completion": "."}])
    texts = write_jsonl(tmp_path / "t.jsonl", [{"text": "t", "prompt": "p", "completion": "c"}])
    sources = [
        Path(plain),
        {"path": asked, "columns": {"prompt": "q"}},
        {"path": f"{texts}:train[:1]", "format": "text"},
    ]
    module = set_up(tokenizer, sources)
    assert prompts_of(module) == ["a", "aa", "aaa", "b", "bb", ""]
    assert len(list(module.train_dataloader())) == 1
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    with pytest.raises(DataError, match=r"^record 2 of '.*bad\.jsonl' has no completion"):
        set_up(tokenizer, [plain, bad])
    limits: Any = Limits()
    with pytest.raises(DataError, match=r"^record 3 of '.*a\.jsonl' has 5 tokens, and the model has 4 positions; set"):
        module.require_model_takes(limits, 0)


def test_weights_are_the_shares_that_are_drawn(
    tokenizer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = source_of(tmp_path, "a", 200), source_of(tmp_path, "b", 50)
    sources = [{"path": a, "weight": 3}, {"path": b, "weight": 1}]

    def counts(seed: int, **options: Any) -> tuple[int, int, list[str]]:
        prompts = prompts_of(set_up(tokenizer, sources, seed=seed, **options))
        return sum("a" in each for each in prompts), sum("b" in each for each in prompts), prompts

    with caplog.at_level(logging.INFO):
        taken_a, taken_b, prompts = counts(0)
    line = (
        f"The training data of an epoch are {taken_a} from the 200 records of {a!r} (weight 3) and {taken_b} from the "
        f"50 records of {b!r} (weight 1)."
    )
    assert line in [record.message for record in caplog.records]
    # None is drawn twice before one source has no more; three of four are of the first within chance.
    assert len(set(prompts)) == len(prompts)
    assert taken_a == 200 or taken_b == 50
    assert taken_a / len(prompts) == pytest.approx(0.75, abs=0.1)
    assert counts(0)[2] == prompts
    assert counts(1)[2] != prompts
    # Which of the records are drawn does not depend on their places, unless they are to keep their order.
    assert max(map(len, (each for each in prompts if "b" in each))) > 40
    in_order = counts(0, shuffle=False, group_by_length=False)[2]
    assert [each for each in in_order if "b" in each] == ["b" * (1 + n) for n in range(sum("b" in e for e in in_order))]
    everything = counts(0, stopping_strategy="all_exhausted")[2]
    assert len(set(everything)) == 250
    assert len(everything) > 250


def test_share_of_the_training_data_for_validation(tokenizer: str, tmp_path: Path) -> None:
    a, b = source_of(tmp_path, "a", 20), source_of(tmp_path, "b", 10)

    def parts(train: Any, **options: Any) -> tuple[list[str], list[str]]:
        module = set_up(tokenizer, train, validation_fraction=0.2, **options)
        assert len(module.val_dataloader()) == 1  # type: ignore[arg-type]
        return prompts_of(module), [row["prompt"] for row in module._prepared["validation"]]

    train, validation = parts(a)
    assert (len(train), len(validation)) == (16, 4)
    assert sorted(train + validation, key=len) == ["a" * (1 + n) for n in range(20)]
    assert validation != ["a" * n for n in range(17, 21)]
    assert parts(a) == (train, validation)
    assert parts(a, seed=1)[1] != validation
    # Of each source, whatever its weight.
    train, validation = parts([{"path": a, "weight": 1}, {"path": b, "weight": 1}])
    assert ("".join(validation).count("a") > 0, sum("b" in each for each in validation)) == (True, 2)
    assert not set(train) & set(validation)
    with pytest.raises(
        DataError, match=r"has 1 record, of which validation_fraction=0\.2 leaves none to train on; low"
    ):
        parts(source_of(tmp_path, "c", 1))
    long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "a" * 9, "completion": "."} for _ in range(5)])
    numbers = set()
    for seed in range(9):
        with pytest.raises(DataError, match=r"^record \d of '.*long\.jsonl' has 11 tokens") as raised:
            set_up(tokenizer, long, "validate", validation_fraction=0.2, seed=seed, max_length=5, too_long="error")
        numbers.add(str(raised.value)[7])
    # The place in the file, and not that among those for validation.
    assert len(numbers) > 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"train": []}, "data.train is an empty list; name at least one source"),
        (
            {"train": [{"path": "a", "wieght": 1}]},
            "a source of data.train has the unknown key 'wieght'; give a name, or ",
        ),
        (
            {"train": [{"weight": 1}]},
            "a source of data.train has no path; give a name, or path, weight, format, columns ",
        ),
        ({"train": [{"path": "a", "weight": 0}]}, "the weight of 'a' is 0; give a positive number"),
        ({"train": [{"path": "a", "weight": "x"}]}, "the weight of 'a' is x; give a positive number"),
        (
            {"train": ["a", {"path": "b", "weight": 1}]},
            "the source 'a' has no weight and others have; give one to all or",
        ),
        (
            {"test": [{"path": "a", "weight": 1}]},
            "data.test has a source with a weight, which data.train alone can have",
        ),
        ({"train": [{"path": "a", "format": "x"}]}, "format='x' is unknown; use messages, prompt_completion, alpaca, "),
        (
            {"train": [{"path": "a", "columns": {"x": "y"}}]},
            "columns has the unknown key 'x'; use 'messages', 'tools', ",
        ),
        (
            {"train": "a", "validation_fraction": 1.0},
            r"validation_fraction=1\.0 is no share; set it to more than 0 and ",
        ),
        (
            {"train": "a", "validation": "b", "validation_fraction": 0.1},
            "validation_fraction is for want of data.valid",
        ),
        ({"train": "a", "stopping_strategy": "x"}, "stopping_strategy='x' is unknown; set it to 'first_exhausted' or "),
        (
            {"train": "a", "streaming": True},
            "group_by_length=True needs all training data beforehand, which streaming d",
        ),
        ({"streaming": True, "group_by_length": False, "num_proc": 2}, "num_proc=2 needs all training data beforehand"),
        (
            {"streaming": True, "group_by_length": False, "num_workers": 2},
            "num_workers=2 would have each process read all",
        ),
    ],
)
def test_sources_that_cannot_be(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{reason}") as raised:
        InstructionDataModule("t", **options)
    assert "\n" not in str(raised.value)
