"""Loading processors, and the arguments of the data module."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from module_helpers import saved_model
from transformers import Qwen2VLProcessor
from vision_helpers import CHAT_TEMPLATES, picture, vlm_folders  # noqa: F401

from na_lora_lightning.data import VisionInstructionDataModule
from na_lora_lightning.data.processors import load_processor, without_videos
from na_lora_lightning.errors import ConfigurationError

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
