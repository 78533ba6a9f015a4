"""An existing path is a path, whatever is in its name; what is said about a folder's images is read to the letter."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from module_helpers import private_dataset_cache, write_jsonl  # noqa: F401
from vision_helpers import write_pictures

from na_lora_lightning.data.classes.image_classes import LabelledImages
from na_lora_lightning.data.files.sources import load_records, separate_split
from na_lora_lightning.data.image_reading import ImageReader
from na_lora_lightning.data.record_images import RecordImages, folder_of
from na_lora_lightning.errors import DataError

NAMES = [
    "data[1]",
    "w?",
    "*",
    "a*b",
    "{a,b}",
    "a:b",
    "a::b",
    "a:b+c",
    "a b",
    "~a",
    "#a",
    "%41",
    "a'b\"",
    "é👍",
    "-a",
    "a\\b",
    "$HOME",
]


def prompts(source: str) -> list[str]:
    return list(load_records(source, default_split="train")["prompt"])


@pytest.mark.parametrize("suffix", [".JSONL", ".csv", ".parquet"])
@pytest.mark.parametrize("name", NAMES)
def test_names_of_files_are_no_patterns(
    name: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = ["x", "y", "z"]
    for other in ("data1", "wa", "ab", "a", "b"):
        write_jsonl(tmp_path / f"{other}{suffix}", [{"prompt": "another"}])
    path = Path(f"{name}{suffix}")
    if suffix.lower() == ".csv":
        path.write_text("prompt\nx\ny\nz\n")
    elif suffix == ".parquet":
        with path.open("wb") as file:
            pq.write_table(pa.table({"prompt": rows}), file)
    else:
        write_jsonl(path, [{"prompt": row} for row in rows])
    for source in (str(path), str(path.absolute()), f"./{path}"):
        assert prompts(source) == rows
        assert prompts(f"{source}:train[1:]") == ["y", "z"]
        assert separate_split(f"{source}:train[1:]+train[:1]") == (source, "train[1:]+train[:1]")
    assert folder_of(f"./{path}:train") == Path()


@pytest.mark.parametrize("name", [*NAMES, "x.jsonl", "jsonl"])
def test_names_of_folders_are_no_patterns(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, text in ((f"{name}", "x"), ("data1", "another"), ("wa", "another")):
        Path(folder).mkdir(exist_ok=True)
        write_jsonl(Path(folder) / "train.jsonl", [{"prompt": text}, {"prompt": f"{text}2"}])
        write_jsonl(Path(folder) / "test-[1].jsonl", [{"prompt": "t"}])
    assert prompts(f"{name}/train.jsonl") == ["x", "x2"]
    assert prompts(f"{name}/test-[1].jsonl") == ["t"]
    assert prompts(str(tmp_path / name)) == ["x", "x2"]
    assert prompts(f"./{name}:train[1:]+test") == ["x2", "t"]


def test_folder_of_files_in_capitals(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "train.JSONL", [{"prompt": "x"}])
    write_jsonl(folder / "test.JSONL", [{"prompt": "t"}])
    assert (prompts(str(folder)), prompts(f"{folder}:test")) == (["x"], ["t"])


def test_several_files_of_a_folder_are_one_table(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_jsonl(folder / "train-0.jsonl", [{"prompt": "2020-01-01"}])
    write_jsonl(folder / "train-1.jsonl", [{"prompt": "x", "n": 1}])
    (folder / "README.md").write_text("About it.")
    assert prompts(str(folder)) == ["2020-01-01", "x"]
    with pytest.raises(DataError, match=r'cannot be loaded \(Unknown split "test"'):
        prompts(f"{folder}:test")


def test_links_lead_to_files_and_folders(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "x"}])
    (tmp_path / "l[i]nk.jsonl").symlink_to(source)
    (tmp_path / "folder").symlink_to(tmp_path)
    assert prompts(str(tmp_path / "l[i]nk.jsonl")) == prompts(str(tmp_path / "folder" / "data.jsonl")) == ["x"]


def test_file_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    for text in ("x", "y"):
        source = write_jsonl(tmp_path / "data.jsonl", [{"prompt": text}])
        os.utime(source, (0, 0))
        assert prompts(source) == [text]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("w?.jsonl", "the data file 'w\\?.jsonl' does not exist; correct"),
        ("~nobody-of-that-name/data.jsonl", "does not exist; correct"),
        ("https://example.org/data.jsonl", "is an address; download"),
        ("s3://bucket/data.csv:train", "is an address; download"),
        ("a" * 5000 + ".jsonl", "does not exist; correct"),
        ("a\0b.jsonl", "does not exist; correct"),
    ],
)
def test_path_that_leads_nowhere(source: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "wa.jsonl", [{"prompt": "another"}])
    with pytest.raises(DataError, match=reason):
        prompts(source)


@pytest.mark.parametrize("name", ["pictures", "pic[1]", "a:b"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_dates_beside_images_are_text(name: str, kind: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    for split in ("train", "test"):
        files = write_pictures(folder / split, 2)
        rows = [
            {"file_name": file, "prompt": "when?", "completion": f"2020-01-0{i}"} for i, file in enumerate(files, 1)
        ]
        if kind == "jsonl":
            write_jsonl(folder / split / "metadata.jsonl", rows)
        else:
            lines = [",".join(row.values()) for row in rows]
            (folder / split / "metadata.csv").write_text("\n".join([",".join(rows[0]), *lines]))
    for source in (f"{folder}", f"{folder}:test"):
        records = load_records(source, default_split="train")
        assert list(records["completion"]) == ["2020-01-01", "2020-01-02"]
        images = RecordImages(records, source, ImageReader(folder_of(source)))
        assert images.survey() == ([1, 1], {})
        assert images.read(0, 1)[0].size == (24, 24)


def test_several_images_of_a_record(tmp_path: Path) -> None:
    files = write_pictures(tmp_path / "p", 2)
    rows = [{"file_names": files, "prompt": "2020-01-01"}, {"file_names": files[:1], "prompt": "b"}]
    write_jsonl(tmp_path / "p" / "metadata.jsonl", rows)
    records = load_records(str(tmp_path / "p"), default_split="train")
    images = RecordImages(records, "p", ImageReader(tmp_path))
    assert (images.survey(), list(records["prompt"])) == (([2, 1], {}), ["2020-01-01", "b"])


def test_records_name_images_in_any_form(tmp_path: Path) -> None:
    a, b = write_pictures(tmp_path, 2)
    rows = [{"images": [a, b]}, {"images": None}, {"images": [{"path": a}]}, {"image": b}, {"images": [], "image": a}]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    records = load_records(str(tmp_path / "data.json"), default_split="train")
    assert RecordImages(records, "data", ImageReader(tmp_path)).survey() == ([2, 0, 1, 1, 0], {})


@pytest.mark.parametrize("labels", [["2020-01-01", "2020-01-02"], [0, 1], ["1", "2"]])
def test_labels_are_as_they_are_written(labels: list[str | int], tmp_path: Path) -> None:
    rows = [{"image": file, "label": label} for file, label in zip(write_pictures(tmp_path, 2), labels, strict=True)]
    assert LabelledImages.read(write_jsonl(tmp_path / "data.jsonl", rows), default_split="train").labels == labels
