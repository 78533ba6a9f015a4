"""What is said about the images of a folder is read to the letter, too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_data_helpers import private_dataset_cache, write_jsonl  # noqa: F401
from vision_helpers import write_pictures

from na_lora_lightning.data.classes.image_classes import LabelledImages
from na_lora_lightning.data.files.sources import load_records
from na_lora_lightning.data.image_reading import ImageReader
from na_lora_lightning.data.record_images import RecordImages, folder_of


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
