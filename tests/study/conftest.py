"""A tiny base model and cells of seconds, on real images of digits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.study.cells import Arm, Cell, Setting
from benchmarks.study.run.models import take_shipped

TRAINING: dict[str, Any] = {
    "steps": 6,
    "batch_size": 4,
    "evaluate_every": 3,
    "evaluation_batch_size": 32,
    "max_length": 84,
    "schedule": "cosine",
    "warmup_fraction": 0.05,
    "weight_decay": 0.0,
    "clip": 1.0,
}


@pytest.fixture(scope="session", name="tokenizer")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as the study's models have it; ``<end>`` ends documents and pads."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["a digit is drawn with dots and crosses", "Digit: 3"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", bos_token="<end>", pad_token="<end>")


@pytest.fixture(scope="session", name="base_model")
def base_models_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Folder of a Llama with two layers of 24 gates, with a tokenizer and held-out windows."""
    folder = tmp_path_factory.mktemp("base")
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
def picture_models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the study's model that sees."""
    folder = tmp_path_factory.mktemp("models") / "llava-silu"
    assert take_shipped(folder)
    return folder


@pytest.fixture(name="make_cell")
def cell_maker(base_model: Path) -> Any:
    """Makes a cell of an arm's options."""

    def make(
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
        source: Mapping[str, Any] | None = None,
        model: Path = base_model,
        **training: Any,
    ) -> Cell:
        data = {"source": source or {"kind": "digits"}, "train": 24, "valid": 8, "test": 8, "label_noise": 0.25}
        lora = {"rank": 2, "alpha": 4, "targets": "all-linear"}
        arm = Arm.from_options("arm", options)
        trained = TRAINING | training | dict(arm.training)
        return Cell(Setting("tiny", str(model), "digits", data, trained, lora), arm, 0.01, seed)

    return make
