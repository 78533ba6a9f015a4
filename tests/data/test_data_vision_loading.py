"""Missing and broken images, loading processes, resumption, and training from end to end."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from module_helpers import private_dataset_cache, quiet_trainer, write_jsonl  # noqa: F401
from test_data import RecordingModule, SaveAt, trainer
from vision_helpers import (
    numbered_vision_records,
    picture,
    target_texts,
    vlm_folders,  # noqa: F401
    write_pictures,
    write_vision_records,
)

from na_lora_lightning import NALoRALightningModule
from na_lora_lightning.arguments import EvaluationOptions, LoRAOptions
from na_lora_lightning.data import LeftOutRecordsWarning, VisionInstructionDataModule
from na_lora_lightning.errors import ConfigurationError, DataError, ImageError
from na_lora_lightning.modules.evaluation import Evaluator

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
    # The machine of the tests may have one processor.
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]

Vlm = Callable[[str], str]
LEFT = {"skip_broken_images": True}
REMEDY = r", or set skip_broken_images to true to leave such records out\.$"


def module_of(folder: str, *, stage: str = "fit", **options: Any) -> VisionInstructionDataModule:
    datamodule = VisionInstructionDataModule(folder, **{"num_workers": 0, **options})
    datamodule.setup(stage)
    return datamodule


def damaged(folder: Path, *, missing: tuple[int, ...] = (), broken: tuple[int, ...] = (), count: int = 6) -> str:
    """Numbered records, of some of which the pictures are missing or broken."""
    source = write_vision_records(folder, count)
    for number in missing:
        (folder / "pictures" / f"{number}.png").unlink()
    for number in broken:
        (folder / "pictures" / f"{number}.png").write_bytes(b"no picture")
    return source


# ---- missing and broken images ----


def test_missing_file_is_an_error_before_training(vlm: Vlm, tmp_path: Path) -> None:
    source = damaged(tmp_path, missing=(2, 4))
    reason = (
        r"^record 3 of '.*data\.jsonl' has the image 'pictures/2\.png', which does not exist in '.*'; correct its path"
    )
    with pytest.raises(ImageError, match=reason + REMEDY):
        module_of(vlm("llava"), train=source)


def test_missing_files_are_left_out_and_counted(vlm: Vlm, tmp_path: Path) -> None:
    source = damaged(tmp_path, missing=(2, 4))
    reason = (
        r"^2 of 6 records of '.*' are left out because their images are missing: record 3 of '.*' has the image 'pict"
    )
    with pytest.warns(LeftOutRecordsWarning, match=reason):
        datamodule = module_of(vlm("llava"), train=source, **LEFT)
    texts = [text for batch in datamodule.train_dataloader() for text in target_texts(datamodule, batch)]
    assert sorted(texts) == [f" {number} </s>" for number in (0, 1, 3, 5)]
    assert datamodule.describe()["train"].records == 4
    assert len(datamodule.left_out) == 2
    for number in (0, 1, 3, 5):
        (tmp_path / "pictures" / f"{number}.png").unlink()
    with pytest.raises(
        ImageError, match=r"^record 1 of .* correct its path, as no record of the data has its images\.$"
    ):
        module_of(vlm("llava"), train=source, **LEFT)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_file_is_an_error_in_one_sentence(num_workers: int, vlm: Vlm, tmp_path: Path) -> None:
    source = damaged(tmp_path, broken=(2,))
    datamodule = module_of(vlm("llava"), train=source, batch_size=2, num_workers=num_workers)
    reason = r"^record 3 of '.*data\.jsonl' has the image 'pictures/2\.png', which cannot be decoded \(.*\); replace it"
    with pytest.raises(ImageError, match=reason + REMEDY) as raised:
        list(datamodule.train_dataloader())
    assert "\n" not in str(raised.value)


def test_limits_of_images_reach_the_reader(vlm: Vlm, tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    source = write_jsonl(tmp_path / "data.jsonl", [{"image": "0.png", "prompt": "a", "completion": "b"}])
    for options, reason in (
        (
            {"max_image_pixels": 575},
            r"^record 1 of '.*' has the image '0\.png', which has more pixels than max_image_pix",
        ),
        (
            {"max_image_bytes": 100},
            r"^record 1 of '.*' has the image '0\.png' of 1,\d\d\d bytes, more than max_image_byt",
        ),
    ):
        with pytest.raises(ImageError, match=reason + ".*" + REMEDY):
            list(module_of(vlm("llava"), train=source, **options).train_dataloader())
    assert len(list(module_of(vlm("llava"), train=source, max_image_pixels=576).train_dataloader())) == 1
    small = module_of(vlm("qwen2_vl"), train=source, resize_longest_side=16)
    (batch,) = small.train_dataloader()
    assert batch["image_grid_thw"].tolist() == [[1, 2, 2]]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["llava", "idefics3"])
def test_broken_files_are_left_out_of_their_batches(kind: str, num_workers: int, vlm: Vlm, tmp_path: Path) -> None:
    source = damaged(tmp_path, broken=(0, 4, 5))
    options = {"batch_size": 2, "shuffle": False, "group_by_length": False, "num_workers": num_workers, **LEFT}
    datamodule = module_of(vlm(kind), train=source, validation=source, **options)
    reasons = []
    for loader in (datamodule.train_dataloader(), datamodule.val_dataloader()):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            batches = list(loader)
        reasons += [str(warning.message) for warning in caught if warning.category is LeftOutRecordsWarning]
        texts = [target_texts(datamodule, batch) for batch in batches]
        end = " </s>" if kind == "llava" else "<end_of_utterance>"
        # Nobody takes their place, and the batch of which nothing is left has nothing to learn.
        assert texts == [[f" 1{end}"], [f" 2{end}", f" 3{end}"], [""]]
    assert batches[2]["input_ids"].shape == (1, 1)
    assert batches[2]["prompts"] == batches[2]["references"] == []
    assert [reference.strip() for reference in batches[1]["references"]] == ["2", "3"]
    # Each is named once, though it is met again.
    assert [reason.partition(" of ")[0] for reason in reasons] == ["record 1", "record 5", "record 6"]
    assert reasons[0].endswith("replace it; until then it is left out.")
    assert len(datamodule.left_out) == 3


def test_empty_batch_is_evaluated_and_predicted_as_nothing(vlm: Vlm, tmp_path: Path) -> None:
    source = damaged(tmp_path, broken=(0, 1), count=2)
    options = {"validation": source, "predict": source, "num_workers": 0, **LEFT}
    datamodule = VisionInstructionDataModule(vlm("llava"), **options)
    lora = LoRAOptions(r=2, target_modules=["q_proj"])
    module = NALoRALightningModule(vlm("llava"), lora=lora, evaluation=EvaluationOptions(generate=True))
    with pytest.warns(LeftOutRecordsWarning):
        metrics = quiet_trainer(tmp_path).validate(module, datamodule=datamodule, verbose=False)
    assert metrics == [{}]
    assert quiet_trainer(tmp_path).predict(module, datamodule=datamodule) == [[]]


def test_image_that_the_processor_refuses_is_named(vlm: Vlm, tmp_path: Path) -> None:
    source = write_vision_records(tmp_path, 3)
    picture(1, 300, 1).save(tmp_path / "pictures" / "1.png")
    datamodule = module_of(vlm("qwen2_vl"), train=source)
    reason = (
        r"^record 2 of '.*' is refused by Qwen2VLProcessor \(absolute aspect ratio must be .*\); replace its images"
    )
    with pytest.raises(ImageError, match=reason + REMEDY):
        list(datamodule.train_dataloader())
    datamodule = module_of(vlm("qwen2_vl"), train=source, **LEFT)
    with pytest.warns(LeftOutRecordsWarning, match=r"^record 2 of '.*' is refused by Qwen2VLProcessor"):
        (batch,) = datamodule.train_dataloader()
    assert sorted(target_texts(datamodule, batch)) == ["0<|im_end|>", "2<|im_end|>"]


def test_images_that_do_not_go_into_one_batch_are_reported(vlm: Vlm, tmp_path: Path) -> None:
    source = write_vision_records(tmp_path, 2)
    options = {"do_center_crop": False, "do_resize": False}
    datamodule = module_of(vlm("llava"), train=source, image_options=options)
    with pytest.raises(
        DataError,
        match=r"^record \d of '.*' and those beside it cannot be put in one batch by LlavaProcessor \(.*\); set b",
    ):
        list(datamodule.train_dataloader())
    assert len(list(module_of(vlm("llava"), train=source, image_options=options, batch_size=1).train_dataloader())) == 2


# ---- order and resumption ----


def make(folder: str, source: str, **options: Any) -> VisionInstructionDataModule:
    settings = {"train": source, "validation": f"{source}:train[:3]", "batch_size": 2, "num_workers": 0}
    return VisionInstructionDataModule(folder, **{**settings, **options})


def test_loading_processes_change_nothing(vlm: Vlm, tmp_path: Path) -> None:
    source = damaged(tmp_path, broken=(3,), count=7)
    seen = []
    for num_workers in (0, 2):
        module = RecordingModule()
        with pytest.warns(
            LeftOutRecordsWarning, match=r"^record 4 of '.*' has the image 'pictures/3\.png', which cannot"
        ):
            trainer(max_epochs=2).fit(module, make(vlm("qwen2_vl"), source, num_workers=num_workers, **LEFT))
        seen.append(module.seen)
        assert module.validated == ["0", "1", "2"] * 2
    assert len(seen[0]) == 8
    assert seen[0] == seen[1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_run_sees_the_batches_that_are_left(num_workers: int, vlm: Vlm, tmp_path: Path) -> None:
    source = write_vision_records(tmp_path, 7)
    folder = vlm("idefics3")
    uninterrupted, saving = RecordingModule(), SaveAt("on_train_batch_end", tmp_path)
    trainer(saving, max_epochs=2).fit(uninterrupted, make(folder, source))
    assert len(uninterrupted.seen) == 8
    for done in (1, 3, 4, 6) if num_workers == 0 else (3,):
        resumed = RecordingModule()
        checkpoint = saving.checkpoints[done]
        datamodule = make(folder, source, num_workers=num_workers)
        trainer(max_epochs=2).fit(resumed, datamodule, ckpt_path=checkpoint)
        assert resumed.seen == uninterrupted.seen[done:], done
    with pytest.raises(
        ConfigurationError, match="saved with batch_size=2, so training cannot be resumed from it with b"
    ):
        trainer(max_epochs=2).fit(RecordingModule(), make(folder, source, batch_size=3), ckpt_path=checkpoint)


# ---- with the module ----


@pytest.mark.parametrize("kind", ["idefics3", "qwen2_5_vl", "gemma3"])
def test_module_trains_and_evaluates(kind: str, vlm: Vlm, tmp_path: Path) -> None:
    source = write_vision_records(tmp_path, 4)
    datamodule = make(vlm(kind), source, batch_size=4, shuffle=False, group_by_length=False)
    module = NALoRALightningModule(
        vlm(kind),
        lora=LoRAOptions(r=4, alpha=8),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
        evaluation=EvaluationOptions(generate=True, max_new_tokens=2, sample_count=2),
    )
    before = quiet_trainer(tmp_path).validate(module, datamodule=datamodule, verbose=False)[0]
    fitting: Trainer = quiet_trainer(tmp_path, max_epochs=8)
    fitting.fit(module, datamodule)
    after = fitting.callback_metrics
    names = ("loss", "perplexity", "token_accuracy", "exact_match", "contains_match")
    assert set(before) == {f"validation/{name}" for name in names}
    assert float(after["validation/loss"]) < before["validation/loss"] - 0.1
    evaluator: Evaluator = module.evaluator
    assert [(answer.prompt, answer.reference.strip()) for answer in evaluator.answers] == [
        (record["prompt"], record["completion"]) for record in numbered_vision_records(2)
    ]
