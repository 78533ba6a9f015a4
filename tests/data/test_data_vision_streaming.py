"""Streamed training data with images: the batches of plain data, and what is wrong with a record where it comes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from module_helpers import private_dataset_cache, write_jsonl  # noqa: F401
from test_data import RecordingModule, SaveAt, trainer
from vision_helpers import (  # noqa: F401
    numbered_vision_records,
    target_texts,
    vlm_folders,
    write_pictures,
    write_vision_records,
    write_vision_sources,
)

from na_lora_lightning.data import VisionInstructionDataModule
from na_lora_lightning.data.text.splits import LeftOutRecordsWarning
from na_lora_lightning.errors import ConfigurationError, DataError, ImageError

pytestmark = [
    pytest.mark.usefixtures("private_dataset_cache"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
    # Of Lightning, where the data have no length.
    pytest.mark.filterwarnings("ignore:.*Consider setting `persistent_workers`"),
]

Vlm = Callable[[str], str]


def streamed(folder: str, train: Any, **options: Any) -> VisionInstructionDataModule:
    settings = {"streaming": True, "group_by_length": False, "num_workers": 0, "batch_size": 2, "shuffle_buffer": 4}
    return VisionInstructionDataModule(folder, train=train, **{**settings, **options})


def batches_of(datamodule: VisionInstructionDataModule) -> list[dict[str, Any]]:
    datamodule.prepare_data()
    datamodule.setup("fit")
    loader: Any = datamodule.train_dataloader()
    return [{name: value.tolist() for name, value in batch.items()} for batch in loader]


def test_every_source_gives_the_batches_of_plain_data(vlm: Vlm, tmp_path: Path) -> None:
    sources = write_vision_sources(tmp_path, 5)
    plain = batches_of(streamed(vlm("qwen2_vl"), next(iter(sources)), streaming=False, shuffle=False))
    assert [len(batch["labels"]) for batch in plain] == [2, 2, 1]
    for name, columns in sources.items():
        assert batches_of(streamed(vlm("qwen2_vl"), name, columns=columns, shuffle=False)) == plain, name


def test_records_are_shuffled_mixed_and_read_in_a_process(vlm: Vlm, tmp_path: Path) -> None:
    first, second = (write_vision_records(tmp_path / name, count) for name, count in (("a", 7), ("b", 4)))
    module = streamed(vlm("llava"), [first, second])
    module.setup("fit")
    batches = list(module.train_dataloader())
    answers = [text.partition("<")[0].strip() for batch in batches for text in target_texts(module, batch)]
    expected = [row["completion"] for count in (7, 4) for row in numbered_vision_records(count)]
    assert sorted(answers) == sorted(expected)
    assert answers != expected
    again = batches_of(streamed(vlm("llava"), [first, second], num_workers=1))
    assert again == [{name: value.tolist() for name, value in batch.items()} for batch in batches]


def test_records_without_images_stand_beside_others(vlm: Vlm, tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures", 1)
    source = write_jsonl(
        tmp_path / "data.jsonl",
        [
            {"prompt": "a", "completion": "b", "image": None},
            {"prompt": "c", "completion": "d", "image": "pictures/0.png"},
            {"prompt": "e", "completion": "f"},
        ],
    )
    plain = batches_of(streamed(vlm("qwen2_vl"), source, streaming=False, shuffle=False))
    assert batches_of(streamed(vlm("qwen2_vl"), source, shuffle=False)) == plain


def test_a_resumed_run_sees_the_batches_that_are_left(vlm: Vlm, tmp_path: Path) -> None:
    source = write_vision_records(tmp_path / "data", 7)

    def make(**options: Any) -> VisionInstructionDataModule:
        return streamed(vlm("qwen2_vl"), source, **options)

    whole, saving = RecordingModule(), SaveAt("on_train_batch_end", tmp_path)
    trainer(saving, max_epochs=3).fit(whole, datamodule=make())
    assert len(whole.seen) == 12
    for done in (2, 4, 9):
        resumed = RecordingModule()
        trainer(max_epochs=3).fit(resumed, datamodule=make(num_workers=done % 2), ckpt_path=saving.checkpoints[done])
        assert resumed.seen == whole.seen[done:], done
    with pytest.raises(ConfigurationError, match=r"was saved with seed=0, so training cannot be resumed"):
        trainer(max_epochs=3).fit(RecordingModule(), datamodule=make(seed=1), ckpt_path=saving.checkpoints[2])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_is_missing_is_told_when_its_record_comes(num_workers: int, vlm: Vlm, tmp_path: Path) -> None:
    source = write_vision_records(tmp_path, 4)
    (tmp_path / "pictures" / "2.png").unlink()
    options: dict[str, Any] = {"shuffle": False, "num_workers": num_workers}
    with pytest.raises(ImageError, match=r"^record 3 of '.*data\.jsonl' .*, or set skip_broken_images to true"):
        batches_of(streamed(vlm("qwen2_vl"), source, **options))
    module = streamed(vlm("qwen2_vl"), source, skip_broken_images=True, **options)
    with pytest.warns(LeftOutRecordsWarning, match=r"^record 3 of '.*data\.jsonl' .*; until then it is left out"):
        left = batches_of(module)
    assert [len(batch["labels"]) for batch in left] == [2, 1]
    assert len(module.left_out) == 1


def test_what_cannot_be_streamed_is_refused(vlm: Vlm, tmp_path: Path) -> None:
    source = write_vision_records(tmp_path, 2)
    with pytest.raises(ConfigurationError, match=r"^num_workers=2 would have each process read all of a stream"):
        streamed(vlm("llava"), source, num_workers=2)
    with pytest.raises(ConfigurationError, match=r"^group_by_length=True needs all training data beforehand"):
        streamed(vlm("llava"), source, group_by_length=True)
    without = write_jsonl(tmp_path / "without.jsonl", [{"prompt": "a", "completion": "b", "picture": "x.png"}])
    reason = (
        r"^the first record of '.*without\.jsonl' has no 'image' or 'images' \(it has 'prompt', 'completion'.*\); name"
    )
    with pytest.raises(DataError, match=reason):
        streamed(vlm("llava"), without).setup("fit")


def test_gates_are_found_with_a_question_about_noise(vlm: Vlm, tmp_path: Path) -> None:
    module = streamed(vlm("llava"), write_vision_records(tmp_path, 2))
    module.setup("fit")
    for path in (tmp_path / "pictures").iterdir():
        path.unlink()
    assert {"input_ids", "pixel_values"} <= module.example_batch().keys()
