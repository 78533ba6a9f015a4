"""A tiny base model and a study of seconds, on real images of digits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from study_helpers import ARMS
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.study.base_models import vision
from benchmarks.study.base_models.language import make_tokenizer
from benchmarks.study.run.specification import Study, load_study
from benchmarks.study.run.storage import Results
from benchmarks.study.tasks import pools


@pytest.fixture(scope="session", name="base_model")
def base_models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Llama with two layers of 24 gates, with a tokenizer and held-out windows."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = make_tokenizer(["a digit is drawn with dots and crosses", "Digit: 3"])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=96,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.save(torch.arange(64).reshape(4, 16), folder / "held_out.pt")
    return folder


@pytest.fixture(scope="session", name="picture_model")
def picture_models_folder(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of that Llama with a vision tower and a projector that were hardly trained."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(base_model, folder / "llama-silu")
    record = {"name": "llama-silu", "weights_sha256": "", "held_out_loss": 0.0}
    (folder / "llama-silu" / "pretraining.json").write_text(json.dumps(record))
    vision.pretrain("llava-silu", folder, tower_steps=2, projector_steps=2, batch_size=4)
    return folder / "llava-silu"


@pytest.fixture(autouse=True, name="cached_pools")
def pools_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "CACHE", tmp_path_factory.getbasetemp() / "pools")


@pytest.fixture(name="results")
def no_results(tmp_path: Path) -> Results:
    """Results of a test's own, none at first."""
    return Results(tmp_path / "packed", tmp_path / "cells")


@pytest.fixture(name="make_study")
def study_maker(base_model: Path, tmp_path: Path) -> Any:
    """Writes a study file with some of the arms and reads it."""

    def make(
        arms: list[str], seeds: list[int] | None = None, source: dict[str, Any] | None = None, **changes: Any
    ) -> Study:
        source = source or {"kind": "digits"}
        data = {"source": source, "train": 24, "valid": 8, "test": 8, "label_noise": 0.25}
        training = {"steps": 6, "batch_size": 4, "evaluate_every": 3, "max_length": 84}
        study = {
            "role": "screening",
            "models": {"tiny": str(base_model)},
            "arms": arms,
            "seeds": seeds or [0],
            "rates": [0.01],
            "settings": [{"model": "tiny", "task": "digits", "rank": 2}],
        }
        (tmp_path / "tasks.yaml").write_text(
            json.dumps({"digits": {"role": "screening", "data": data, "training": training}})
        )
        (tmp_path / "arms.yaml").write_text(json.dumps(ARMS))
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(study | changes))
        return load_study(tmp_path / "tiny.yaml")

    return make
