"""The adapter folders of models for images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dual_encoder_helpers import make_module, saved_dual_encoder, write_shapes
from huggingface_hub import ModelCard
from module_helpers import quiet_trainer
from transformers import GenerationConfig
from vision_helpers import END_OF_ANSWER, tiny_vlm, write_vision_records

from na_lora_lightning.arguments import AdapterArguments, EvaluationArguments, LoRAArguments
from na_lora_lightning.cli.merge import MergeArguments, merge_adapter
from na_lora_lightning.data import VisionInstructionDataModule
from na_lora_lightning.data.classes.datamodule import LabelledImageDataModule
from na_lora_lightning.data.processors import load_processor
from na_lora_lightning.modules.language import NALoRALightningModule


def require_no_place(folder: Path, place: Path) -> None:
    assert [file.name for file in folder.iterdir() if str(place) in file.read_bytes().decode("latin-1")] == []


@pytest.mark.parametrize("kind", ["llava", "gemma3", "qwen2_5_vl"])
def test_a_model_for_images_and_text(tmp_path: Path, kind: str) -> None:
    base = tiny_vlm(kind, tmp_path / "base")
    data = VisionInstructionDataModule(
        str(base), train=write_vision_records(tmp_path / "data", 2), batch_size=2, num_workers=0
    )
    module = NALoRALightningModule(
        str(base), lora=LoRAArguments(r=2, alpha=4), evaluation=EvaluationArguments(max_new_tokens=4)
    )
    quiet_trainer(tmp_path).fit(module, data)
    adapter, end = tmp_path / "adapter", END_OF_ANSWER[kind].strip()
    require_no_place(adapter, tmp_path)
    if not kind.startswith("qwen"):
        # Without its part for videos, which needs what is not installed here, it is loaded beside a model alone.
        processor = load_processor(str(adapter), revision=None, trust_remote_code=False)
        assert type(processor).__name__ == type(data.processor).__name__
        assert processor.chat_template == data.processor.chat_template
    assert module.end_token_ids == [data.tokenizer.convert_tokens_to_ids(end)]
    own = GenerationConfig.from_pretrained(base).eos_token_id
    expected = own if own == module.end_token_ids[0] else [own, *module.end_token_ids]
    card = ModelCard.load(adapter / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "AutoModelForImageTextToText" in card.text

    merge_adapter(MergeArguments(adapter, tmp_path / "merged"))
    for folder in (adapter, tmp_path / "merged"):
        assert GenerationConfig.from_pretrained(folder).eos_token_id == expected
        settings, before = (json.loads((place / "processor_config.json").read_text()) for place in (folder, base))
        # Its part for videos too.
        assert settings.get("video_processor") == before.get("video_processor")
        assert settings["image_processor"] == before["image_processor"]
    merged = load_processor(str(tmp_path / "merged"), revision=None, trust_remote_code=False)
    assert merged.chat_template == data.processor.chat_template


def test_a_dual_encoder(tmp_path: Path) -> None:
    base = saved_dual_encoder(tmp_path / "base")
    data = LabelledImageDataModule(base, train=write_shapes(tmp_path / "train", 2), batch_size=2, num_workers=0)
    module = make_module(base, adapter=AdapterArguments(folder=str(tmp_path / "adapter")))
    quiet_trainer(tmp_path).fit(module, data)
    adapter = tmp_path / "adapter"
    require_no_place(adapter, tmp_path)
    assert not (adapter / "generation_config.json").exists()
    assert type(load_processor(str(adapter), revision=None, trust_remote_code=False)).__name__ == "CLIPProcessor"
    card = ModelCard.load(adapter / "README.md")
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert f"Classes: {', '.join(f'`{name}`' for name in module.class_names or [])}." in card.text
    merge_adapter(MergeArguments(adapter, tmp_path / "merged"))
    load_processor(str(tmp_path / "merged"), revision=None, trust_remote_code=False)
