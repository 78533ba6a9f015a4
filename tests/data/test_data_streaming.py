"""Streamed training data: which batches there are, and that a resumed run goes on with those that are left."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, load_dataset
from module_helpers import numbered_records, private_dataset_cache, saved_tokenizer, write_jsonl  # noqa: F401
from test_data import RecordingModule, SaveAt, target_texts, trainer

from na_lora_lightning.data import InstructionDataModule, LeftOutRecordsWarning, TruncationWarning
from na_lora_lightning.data.files import sources, streams
from na_lora_lightning.data.files.sources import load_records
from na_lora_lightning.data.files.streams import stream_records
from na_lora_lightning.errors import ConfigurationError, DataError

pytestmark = [
    pytest.mark.usefixtures("private_dataset_cache"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
    # Of Lightning, where the data have no length.
    pytest.mark.filterwarnings("ignore:.*Consider setting `persistent_workers`"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "data.jsonl", numbered_records(11))


def streamed(tokenizer: str, train: Any, **options: Any) -> InstructionDataModule:
    settings = {"batch_size": 2, "group_by_length": False, "streaming": True, "shuffle_buffer": 4}
    return InstructionDataModule(tokenizer, train=train, **{**settings, **options})


def answers_of(module: InstructionDataModule, epoch: int = 0) -> list[list[str]]:
    """The answers in each batch of an epoch."""
    module.setup("fit")
    loader: Any = module.train_dataloader()
    loader.stream.lengths = dict.fromkeys(range(epoch), 6)
    loader._processed_batches = lambda: 6 * epoch
    return [[text.partition("<")[0] for text in target_texts(module, batch)] for batch in loader]


def numbers(batches: list[list[str]]) -> list[int]:
    return [int(answer) for batch in batches for answer in batch]


def test_every_record_comes_once_in_an_epoch(tokenizer: str, data: str) -> None:
    first, second = (answers_of(streamed(tokenizer, data), epoch) for epoch in (0, 1))
    assert [len(batch) for batch in first] == [2, 2, 2, 2, 2, 1]
    assert sorted(numbers(first)) == sorted(numbers(second)) == list(range(11))
    assert numbers(first) != numbers(second)
    assert answers_of(streamed(tokenizer, data)) == first != answers_of(streamed(tokenizer, data, seed=1))
    assert answers_of(streamed(tokenizer, data, num_workers=1)) == first
    # A record is at most so many places earlier as the buffer has.
    assert all(number <= place + 4 for place, number in enumerate(numbers(first)))


def test_batches_in_order_are_those_of_plain_data(tokenizer: str, data: str) -> None:
    plain = streamed(tokenizer, data, streaming=False, shuffle=False)
    plain.setup("fit")
    stream = streamed(tokenizer, data, shuffle=False)
    stream.setup("fit")
    batches = [[{name: value.tolist() for name, value in batch.items()} for batch in each.train_dataloader()]
               for each in (plain, stream)]  # fmt: skip
    assert batches[0] == batches[1]


def test_mixtures_are_drawn_by_weight(tokenizer: str, tmp_path: Path) -> None:
    rows = numbered_records(200)
    small, large = (write_jsonl(tmp_path / f"{n}.jsonl", part) for n, part in enumerate((rows[:50], rows[50:])))
    weighted = [{"path": small, "weight": 1}, {"path": large, "weight": 3}]
    drawn = numbers(answers_of(streamed(tokenizer, weighted)))
    assert len(set(drawn)) == len(drawn)
    assert sum(number < 50 for number in drawn) / len(drawn) == pytest.approx(0.25, abs=0.08)
    everything = numbers(answers_of(streamed(tokenizer, weighted, stopping_strategy="all_exhausted")))
    assert set(everything) == set(range(200))
    assert sorted(numbers(answers_of(streamed(tokenizer, [small, large])))) == list(range(200))


def test_long_records_are_left_out(tokenizer: str, data: str) -> None:
    module = streamed(tokenizer, data, max_length=24, too_long="leave_out")
    with pytest.warns(LeftOutRecordsWarning) as caught:
        kept = answers_of(module)
    first, last = (str(warning.message) for warning in caught)
    many = "more tokens than max_length=24 and"
    assert re.match(rf"record \d+ of '{data}', and maybe others, has {many} is left out; raise max_length or sh", first)
    assert re.match(rf"\d of 11 records that were tokenised in an epoch have {many} were left out; raise", last)
    plain = streamed(tokenizer, data, max_length=24, too_long="leave_out", streaming=False)
    with pytest.warns(LeftOutRecordsWarning):
        plain.setup("fit")
    assert sorted(numbers(kept)) == [int(row["index"]) for row in plain._prepared["train"]]
    assert 1 < len(numbers(kept)) < 11
    assert [len(batch) for batch in kept[:-1]] == [2] * (len(kept) - 1)
    long = 11 - len(numbers(kept))
    assert last.startswith(f"{long} of")
    none = r"^all 11 records have more tokens than max_length=3, so that none is left; raise"
    with pytest.warns(LeftOutRecordsWarning), pytest.raises(DataError, match=none):
        answers_of(streamed(tokenizer, data, max_length=3, too_long="leave_out"))
    with pytest.raises(DataError, match=r"^record \d+ of '.*data\.jsonl' has 2\d tokens, more than max_length=24"):
        answers_of(streamed(tokenizer, data, max_length=24, too_long="error"))


def test_long_records_are_cut(tokenizer: str, tmp_path: Path) -> None:
    # 20 tokens around a prompt of one.
    long = {"prompt": "a", "completion": "bcdefghi"}
    module = streamed(
        tokenizer, write_jsonl(tmp_path / "cut.jsonl", [long, {**long, "completion": "b"}, long]), max_length=24
    )
    with pytest.warns(TruncationWarning) as caught:
        assert sorted(answer for batch in answers_of(module) for answer in batch) == ["b", "bcde", "bcde"]
    assert re.match(r"2 of 3 records that .* more tokens than max_length=24 and were cut; ", str(caught[-1].message))


def test_processes_share_the_records(tokenizer: str, data: str) -> None:
    shares = []
    for rank in (0, 1):
        module = streamed(tokenizer, data)
        strategy = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": rank})
        module.trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
        module._limit_val_batches = 1
        module.sources["validation"] = "x"
        module._prepare_splits(["train"])
        loader: Any = module.train_dataloader()
        loader._processed_batches = None
        shares.append([[text.partition("<")[0] for text in target_texts(module, batch)] for batch in loader])
    # Three batches of two for each: the last record of eleven is with one of those that stand beside it.
    assert [len(batch) for batch in shares[0]] == [len(batch) for batch in shares[1]] == [2, 2, 2]
    both = numbers(shares[0]) + numbers(shares[1])
    assert (len(both), set(both)) == (12, set(range(11)))


@pytest.mark.filterwarnings("ignore:.*more tokens than max_length=26 and")
@pytest.mark.parametrize("kind", ["plain", "mixture", "left out"])
@pytest.mark.parametrize(
    ("hook", "options"),
    [
        ("on_train_batch_end", {"max_epochs": 3}),
        ("on_train_batch_end", {"max_steps": 14, "accumulate_grad_batches": 1, "val_check_interval": 2}),
        ("on_train_epoch_end", {"max_epochs": 3}),
        ("on_train_batch_end", {"max_epochs": 5, "limit_train_batches": 4}),
    ],
)
def test_resumed_run_sees_the_batches_that_are_left(
    kind: str, hook: str, options: dict[str, Any], tokenizer: str, data: str, tmp_path: Path
) -> None:
    more = write_jsonl(tmp_path / "more.jsonl", numbered_records(20)[11:])
    sources = [{"path": data, "weight": 2}, {"path": more, "weight": 1}] if kind == "mixture" else data
    settings = {"max_length": 26, "too_long": "leave_out"} if kind == "left out" else {}

    def make(**changed: Any) -> InstructionDataModule:
        return streamed(tokenizer, sources, validation=data, **{**settings, **changed})

    whole, saving = RecordingModule(), SaveAt(hook, tmp_path)
    trainer(saving, **options).fit(whole, datamodule=make())
    assert len(whole.seen) >= 10
    assert len({str(batch) for batch in whole.seen}) > 6
    places = sorted(saving.checkpoints)
    for done in {places[0], places[len(places) // 2], places[-2]}:
        resumed = RecordingModule()
        trainer(**options).fit(resumed, datamodule=make(num_workers=done % 2), ckpt_path=saving.checkpoints[done])
        assert resumed.seen == whole.seen[done:], done
    with pytest.raises(
        ConfigurationError, match=r"was saved with seed=0, so training cannot be resumed .* with seed=1;"
    ):
        trainer(**options).fit(RecordingModule(), datamodule=make(seed=1), ckpt_path=saving.checkpoints[places[0]])


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "csv.gz", "parquet", "folder", "saved", "hub"])
def test_streamed_records_are_those_of_a_table(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{**row, "tools": {"a": number} if number % 2 else None} for number, row in enumerate(numbered_records(5))]
    plain = [{name: row[name] for name in ("prompt", "completion")} for row in rows]
    path = tmp_path / f"data.{kind}"
    if kind in ("jsonl", "json", "jsonl.gz"):
        write_jsonl(path, rows)
    elif kind in ("csv", "csv.gz"):
        Dataset.from_list(plain).to_csv(str(path), compression=None)
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    elif kind == "saved":
        Dataset.from_list(plain).save_to_disk(str(path))
    else:
        path.mkdir()
        write_jsonl(path / "train.jsonl", rows)
    if kind.endswith("gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    for module in (sources, streams):
        # A folder in place of a data set of the hub.
        monkeypatch.setattr(module, "load_dataset", lambda path, name, **options: load_dataset(str(folder), **options))
    folder = path
    source = "owner/name" if kind == "hub" else str(path)
    names = {"prompt": "completion", "completion": "prompt"}
    for columns in (None, names):
        table = load_records(source, default_split="train", columns=columns)
        streamed_rows = list(stream_records(source, default_split="train", columns=columns)())
        wanted = [name for name in ("prompt", "completion", "tools") if name in table.column_names]
        expected = [{name: row[name] for name in wanted if row[name] is not None} for row in table]
        assert [{name: row[name] for name in wanted if row.get(name) is not None} for row in streamed_rows] == expected
        assert [row["prompt"] for row in streamed_rows] == [
            row[names["prompt"] if columns else "prompt"] for row in rows
        ]


def test_what_cannot_be_streamed_is_refused(tokenizer: str, data: str, tmp_path: Path) -> None:
    for source, reason in (
        (
            f"{data}:train[:2]",
            "is a part of a split, which cannot be streamed; name a whole split, or set streaming to",
        ),
        (str(tmp_path / "absent.jsonl"), "does not exist; correct the path"),
        (f"{data}:test", r"cannot be loaded \(Unknown split"),
        (write_jsonl(tmp_path / "none.jsonl", []), "is empty; give a file with at least one record"),
    ):
        with pytest.raises(DataError, match=reason):
            streamed(tokenizer, source).setup("fit")
    blank = tmp_path / "blank.jsonl"
    blank.write_text("\n\n")
    with pytest.raises(DataError, match="has no records; give data with at least one record"):
        streamed(tokenizer, str(blank)).setup("fit")
    with pytest.raises(
        DataError, match=r"has no column 'ask' \(its columns are 'prompt', 'completion'\); correct the op"
    ):
        streamed(tokenizer, data, columns={"prompt": "ask"}).setup("fit")
    bad = write_jsonl(tmp_path / "bad.jsonl", [*numbered_records(3), {"prompt": "a"}])
    with pytest.raises(DataError, match=r"^record 4 of '.*bad\.jsonl' has no completion"):
        answers_of(streamed(tokenizer, bad))


def test_tokens_that_a_model_lacks_are_found_when_they_come(tokenizer: str, data: str) -> None:
    module = streamed(tokenizer, data, max_length=30)
    module.setup("fit")
    limits: Any = SimpleNamespace(rows=200, placeholders=frozenset(), usable_length=lambda length: length)
    module.require_model_takes(limits, 0)
    with pytest.raises(DataError, match=r"^record \d+ of '.*' has the token '.*' \(id 25\d\), and the model has embed"):
        list(module.train_dataloader())
    limits.usable_length, limits.describe_positions = (lambda length: min(length, 20)), lambda: "the model has 20"
    with pytest.raises(
        ConfigurationError, match=r"^data\.max_length=30 allows records that are too long, as the model h"
    ):
        module.require_model_takes(limits, 0)
