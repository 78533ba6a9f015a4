"""Reading records from files and folders, loading processors, and the arguments of the data module."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetNotFoundError
from module_helpers import numbered_records, private_dataset_cache, saved_model, write_jsonl  # noqa: F401
from transformers import Qwen2VLProcessor
from vision_helpers import CHAT_TEMPLATES, picture, vlm_folders  # noqa: F401

from na_lora_lightning.data import VisionInstructionDataModule
from na_lora_lightning.data.files import sources
from na_lora_lightning.data.files.sources import load_records
from na_lora_lightning.data.processors import load_processor, without_videos
from na_lora_lightning.errors import ConfigurationError, DataError

RECORDS = numbered_records(10)


def saved_as(kind: str, folder: Path) -> str:
    """Saves the ten records in one of the supported forms and returns the name to load them by."""
    data = Dataset.from_list(RECORDS)
    path = folder / f"data.{kind}"
    if kind == "jsonl":
        write_jsonl(path, RECORDS)
    elif kind == "json":
        path.write_text(json.dumps(RECORDS), encoding="utf-8")
    elif kind == "csv":
        data.to_csv(str(path))
    elif kind == "parquet":
        data.to_parquet(str(path))
    elif kind == "saved":
        data.save_to_disk(str(path))
    elif kind == "saved-splits":
        DatasetDict({"train": data, "other": data.select(range(2))}).save_to_disk(str(path))
    else:
        path.mkdir()
        write_jsonl(path / "train.jsonl", RECORDS)
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved", "saved-splits", "folder"])
def test_every_form_gives_the_same_records(kind: str, tmp_path: Path) -> None:
    assert load_records(saved_as(kind, tmp_path), default_split="train").to_list() == RECORDS


@pytest.mark.parametrize("kind", ["jsonl", "folder"])
def test_part_of_a_split(kind: str, tmp_path: Path) -> None:
    source = saved_as(kind, tmp_path)
    assert load_records(f"{source}:train[:30%]", default_split="x").to_list() == RECORDS[:3]
    assert load_records(f"{source}:train[8:]+train[:1]", default_split="x").to_list() == RECORDS[8:] + RECORDS[:1]


def test_split_of_a_saved_folder(tmp_path: Path) -> None:
    source = saved_as("saved-splits", tmp_path)
    assert load_records(f"{source}:other", default_split="train").to_list() == RECORDS[:2]
    with pytest.raises(DataError, match=r"has no split 'test' \(its splits are train, other\); add"):
        load_records(source, default_split="test")


def test_existing_path_with_a_colon_is_not_taken_apart(tmp_path: Path) -> None:
    (tmp_path / "run:train").mkdir()
    source = saved_as("jsonl", tmp_path / "run:train")
    assert len(load_records(source, default_split="train")) == 10
    assert len(load_records(str(tmp_path / "run:train"), default_split="train")) == 10


def test_csv_cells_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("prompt,completion\na,042\nb,None\nc,1.50\n", encoding="utf-8")
    assert load_records(str(path), default_split="train")["completion"][:] == ["042", "None", "1.50"]


def test_columns_are_renamed(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "b", "completion": "in the way", "id": 1}]
    source = write_jsonl(tmp_path / "data.jsonl", rows)
    columns = {"prompt": "question", "completion": "answer"}
    assert load_records(source, default_split="train", columns=columns).to_list() == [
        {"prompt": "a", "completion": "b", "id": 1}
    ]
    with pytest.raises(DataError, match=r"has no column 'reply' \(its columns are 'question', 'answer'"):
        load_records(source, default_split="train", columns={"completion": "reply"})


def test_columns_can_be_exchanged(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}])
    columns = {"prompt": "completion", "completion": "prompt"}
    loaded = load_records(source, default_split="train", columns=columns)
    assert loaded.to_list() == [{"prompt": "b", "completion": "a"}]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("absent.jsonl", None, r"the data file '.*absent\.jsonl' does not exist; correct"),
        ("absent.csv", None, r"the data file '.*absent\.csv' does not exist; correct"),
        ("absent", None, r"the data '.*absent' cannot be loaded because .* does not exist; correct"),
        ("data.txt", "a", r"because .* is not a \.jsonl, \.ndjson, \.json, \.csv, \.tsv or \.parquet file; correct"),
        ("data.jsonl", "", "is empty; give"),
        ("data.csv", "prompt,completion\n", "has no records; give"),
        ("data.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"\n', r"line 3 of '.*' is malformed \(Expecting ',' "),
        ("data.jsonl", '{"prompt": "a"}\n[1]\n', r"line 2 of '.*' is malformed \(it is not a JSON object\); correct"),
        ("data.json", '[{"prompt": "a"}', "line 1 of '.*' is malformed \\(its array has no end\\)"),
        ("data.parquet", "no parquet", r"the data '.*data\.parquet' cannot be loaded \(.*\); give"),
    ],
)
def test_unusable_file(name: str, content: str | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=reason) as raised:
        load_records(str(tmp_path / name), default_split="train")
    assert "\n" not in str(raised.value)


def test_saved_folder_without_records(tmp_path: Path) -> None:
    Dataset.from_dict({"prompt": [], "completion": []}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"saved' cannot be loaded"):
        load_records(str(tmp_path / "saved"), default_split="train")


def test_unknown_split_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'cannot be loaded \(Unknown split "test"'):
        load_records(saved_as("jsonl", tmp_path) + ":test", default_split="train")


def test_data_sets_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def load_dataset(**arguments: Any) -> Dataset:
        calls.append(arguments)
        if arguments["path"] == "owner/absent":
            raise DatasetNotFoundError("Dataset 'owner/absent' doesn't exist.\nMore.")
        return Dataset.from_list(RECORDS if arguments["path"] == "owner/name" else [])

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    load_records("owner/name", default_split="validation", config="main")
    load_records("owner/name:train[:50%]", default_split="validation")
    assert calls == [
        {"path": "owner/name", "name": "main", "split": "validation"},
        {"path": "owner/name", "name": None, "split": "train[:50%]"},
    ]
    with pytest.raises(DataError, match=r"'owner/absent' cannot be loaded \(Dataset 'owner/absent' doesn't exist\);"):
        load_records("owner/absent", default_split="train")
    with pytest.raises(DataError, match="'owner/empty' has no records; give"):
        load_records("owner/empty", default_split="train")


Vlm = Callable[[str], str]


def test_processor_is_loaded_with_what_it_needs(vlm: Vlm) -> None:
    processor = load_processor(vlm("qwen2_vl"), revision=None, trust_remote_code=False)
    assert type(processor).__name__ == "Qwen2VLProcessor"
    assert processor.tokenizer.chat_template == processor.chat_template
    assert processor.image_processor.patch_size == 8


def test_processor_without_videos_keeps_its_settings(vlm: Vlm, tmp_path: Path) -> None:
    class Demanding(Qwen2VLProcessor):
        def __init__(
            self, image_processor: Any, tokenizer: Any, video_processor: Any, length: int = 1, chat_template: Any = None
        ) -> None:
            super().__init__(image_processor, tokenizer, video_processor, chat_template=chat_template)
            self.length = length
            self.frames = self.video_processor.num_frames

    folder = Path(shutil.copytree(vlm("qwen2_vl"), tmp_path / "model"))
    path = folder / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "length": 7}))
    processor = without_videos(Demanding).from_pretrained(folder)
    assert (processor.length, processor.frames) == (7, None)
    assert processor.chat_template == CHAT_TEMPLATES["qwen2_vl"]
    processor.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "processor_config.json").read_text())["length"] == 7
    copy = pickle.loads(pickle.dumps(load_processor(str(folder), revision=None, trust_remote_code=False)))
    assert copy(text=["<|image_pad|>"], images=[[picture(0)]])["image_grid_thw"].tolist() == [[1, 4, 4]]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda folder: str(folder / "absent"), r"^the processor folder '.*absent' does not exist; correct the path"),
        (lambda folder: saved_model(folder), r"^the model '.*' has no processor for images; give a vision-language"),
        (
            lambda folder: str(folder),
            r"^the processor of '.*' cannot be loaded \(.*\); give the folder or hub name of a",
        ),
    ],
)
def test_model_without_a_processor(make: Callable[[Path], str], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=reason) as raised:
        load_processor(make(tmp_path), revision=None, trust_remote_code=False)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_image_pixels": 0}, "max_image_pixels=0 is too small; set it to 1 or more"),
        ({"max_image_bytes": 0}, "max_image_bytes=0 is too small"),
        ({"resize_longest_side": 0}, "resize_longest_side=0 is too small"),
        ({"batch_size": 0}, "batch_size=0 is too small"),
        ({"shuffle": False}, "shuffle=False keeps the order"),
        (
            {"columns": {"picture": "image"}},
            r"columns has the unknown key 'picture'; use 'image', 'images', 'messages', ",
        ),
    ],
)
def test_argument_that_cannot_work(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        VisionInstructionDataModule("model", **options)


def test_options_of_the_image_processor_are_checked(vlm: Vlm) -> None:
    datamodule = VisionInstructionDataModule(vlm("llava"), image_options={"crop": 3})
    with pytest.raises(
        ConfigurationError, match=r"image_options has 'crop', which CLIPImageProcessor.* does not know; use"
    ):
        _ = datamodule.processor
