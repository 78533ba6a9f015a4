"""Ids and lengths that a model cannot take are one sentence before training; the others are taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from module_helpers import Batches, quiet_trainer, saved_model, some_batches, tiny_tokenizer
from zoo.tiny_models import build

from na_lora_lightning.arguments import EvaluationOptions, LoRAOptions
from na_lora_lightning.data import InstructionDataModule
from na_lora_lightning.data.text.extent import LongRecordsWarning, require_bound
from na_lora_lightning.errors import ConfigurationError, DataError
from na_lora_lightning.models.limits import ModelLimits
from na_lora_lightning.modules.language import NALoRALightningModule


def data(folder: Path, model: str, prompt: int, completion: int, split: str = "train", **options: Any) -> Any:
    """Two records, of which the second is the long one; each character is a token, and the end one more."""
    lines = [{"prompt": "ab", "completion": "c"}, {"prompt": "a" * prompt, "completion": "b" * completion}]
    path = folder / f"{split}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return InstructionDataModule(model, **{split: str(path)}, **options)


def module(model: str, **evaluation: Any) -> NALoRALightningModule:
    return NALoRALightningModule(model, lora=LoRAOptions(r=2), evaluation=EvaluationOptions(**evaluation))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"record 2 of '.*' has 71 tokens, and the model's positions end there \(n_positions=64\); set "),
        ({"max_length": 70}, "has 70 tokens, .* set data.max_length to 64 or less"),
        (
            {"max_length": 62, "pad_to_multiple_of": 48},
            r"62 tokens \(96 when padded\), .*max_length to 48",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.* of 2 records")
def test_records_beyond_a_table_of_positions_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    base = saved_model(tmp_path / "base", "gpt2")
    trainer = quiet_trainer(tmp_path)
    with pytest.raises(DataError, match=message):
        trainer.fit(module(base), datamodule=data(tmp_path, base, 60, 10, **options))
    assert trainer.global_step == 0


@pytest.mark.filterwarnings("ignore:.* of 2 records")
def test_a_record_that_fills_the_table_is_trained_on(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base", "gpt2")
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module(base), datamodule=data(tmp_path, base, 60, 10, max_length=64))
    assert trainer.global_step == 1


def test_computed_positions_go_beyond_with_a_warning(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base")
    trainer = quiet_trainer(tmp_path)
    with pytest.warns(LongRecordsWarning, match=r"has 71 tokens, and the model was made for 64 \(max_position_emb"):
        trainer.fit(module(base), datamodule=data(tmp_path, base, 60, 10))
    assert trainer.global_step == 1


def test_what_is_generated_needs_positions_too(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base", "gpt2")
    with pytest.raises(DataError, match=r"prompt of 50 tokens, .* set evaluation.max_new_tokens to 15 or less"):
        quiet_trainer(tmp_path).predict(module(base), datamodule=data(tmp_path, base, 50, 1, "predict"))
    predicted = quiet_trainer(tmp_path).predict(
        module(base, max_new_tokens=15), datamodule=data(tmp_path, base, 50, 1, "predict")
    )
    assert predicted is not None
    with pytest.raises(DataError, match=r"prompt of 50 tokens, which with evaluation.max_new_tokens=16 is more than"):
        quiet_trainer(tmp_path).validate(
            module(base, generate=True, max_new_tokens=16), datamodule=data(tmp_path, base, 50, 1, "validation")
        )
    # Nothing is generated.
    quiet_trainer(tmp_path).validate(module(base), datamodule=data(tmp_path, base, 50, 1, "validation"))


def test_a_token_without_an_embedding_is_named(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(base)
    # A vocabulary that is larger is no fault in itself.
    quiet_trainer(tmp_path).fit(module(base), datamodule=data(tmp_path, base, 2, 2))
    path = tmp_path / "new.jsonl"
    path.write_text('{"prompt": "ab", "completion": "c"}\n{"prompt": "a<new>", "completion": "c"}\n')
    with pytest.raises(DataError, match=r"record 2 of .* has the token '<new>' \(id 64\), and the model has emb"):
        quiet_trainer(tmp_path).fit(module(base), datamodule=InstructionDataModule(base, train=str(path)))
    tokenizer.pad_token = "<new>"
    tokenizer.save_pretrained(base)
    with pytest.raises(ConfigurationError, match=r"padded with '<new>' \(id 64\), .* ids 0 to 63; set the tokenizer's"):
        quiet_trainer(tmp_path).fit(module(base), datamodule=data(tmp_path, base, 2, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids.fill_(64), "a batch has the token id 64, and the model has embeddings for the ids 0 to 63"),
        (lambda ids: ids.new_zeros(2, 65), "a batch is 65 tokens long, and no more than 64 can be used"),
    ],
)
def test_batches_of_other_data_modules_are_one_sentence_too(tmp_path: Path, change: Any, message: str) -> None:
    batch = some_batches(1)[0]
    batch["input_ids"] = change(batch["input_ids"])
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["labels"] = batch["input_ids"].clone()
    with pytest.raises(DataError, match=message):
        quiet_trainer(tmp_path).fit(module(saved_model(tmp_path / "base", "gpt2")), Batches([batch]))


# The configurations of all say 64: tables with two rows more, two positions fewer, buffers, biases by distance, none.
@pytest.mark.parametrize(
    ("model_type", "usable"),
    [
        ("gpt2", 64),
        ("opt", 64),
        ("roberta", 62),
        ("gptj", 64),
        ("mpt", 64),
        ("ctrl", 64),
        ("bart", 64),
        ("xglm", 1000),
        ("llama", 1000),
        ("bloom", 1000),
        ("mamba", 1000),
    ],
)
def test_the_longest_text_of_a_model_is_found_by_trying(model_type: str, usable: int) -> None:
    model = build("causal-lm", model_type).model.eval()
    limits = ModelLimits(model)
    assert limits.usable_length(1000) == usable
    assert limits.usable_length(40) == 40
    ids = torch.zeros(1, min(usable, 100), dtype=torch.int64)
    model(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_records_with_images_are_bounded_by_max_length() -> None:
    limits = ModelLimits(build("image-text-to-text", "git").model)
    with pytest.raises(ConfigurationError, match=r"data\.max_length=2048 allows records that are too long, as the"):
        require_bound(2048, limits)
    require_bound(2048, ModelLimits(build("image-text-to-text", "llava").model))


def test_placeholders_of_images_need_no_embedding() -> None:
    model = build("image-text-to-text", "paligemma").model
    model.config.image_token_id = 10_000
    limits = ModelLimits(model)
    limits.require_batch({"input_ids": torch.tensor([[10_000, 3]])}, 0)
    with pytest.raises(DataError, match="has the token id 10001"):
        limits.require_batch({"input_ids": torch.tensor([[10_000, 10_001]])}, 0)
