"""Each mistake that a user makes most: one sentence with the remedy, exit status 2, before training starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from module_helpers import saved_model, tiny_tokenizer, write_records
from transformers import MambaConfig, MambaForCausalLM

from na_lora_lightning.cli.main import main


def model_without_gates(folder: Path) -> str:
    """Mamba: its SiLUs follow convolutions and gate a recurrence, and there is no feed-forward block."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=64, hidden_size=8, state_size=4, num_hidden_layers=1, expand=2, time_step_rank=2)
    MambaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def jsonl(folder: Path, *records: dict[str, str]) -> str:
    path = folder / "bad.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


GOOD = {"prompt": "ab", "completion": "c"}


@pytest.mark.parametrize(
    ("make_arguments", "parts"),
    [
        pytest.param(
            lambda folder: ["--model.model_name_or_path", str(folder / "nowhere")],
            ["nowhere", "does not exist", "give the folder of a model"],
            id="unknown model folder",
        ),
        pytest.param(
            lambda folder: [
                "--model.model_name_or_path",
                model_without_gates(folder / "mamba"),
                "--model.lora.target_modules",
                "[in_proj, x_proj]",
            ],
            ["no feed-forward gate was found", "train this model without the NA-LoRA callbacks"],
            id="model without gates",
        ),
        pytest.param(
            lambda folder: ["--model.lora.target_modules", "[q_proj, up_proj]"],
            ["none of the model's 2 gates has LoRA", "model.layers.0.mlp.act_fn", "add 'gate_proj'"],
            id="LoRA on no gate",
        ),
        pytest.param(
            lambda folder: ["--gate_importance.keep_fraction", "0"],
            ["keep_fraction is 0", "above 0 and at most 1"],
            id="keep fraction 0",
        ),
        pytest.param(
            lambda folder: ["--gate_importance.keep_fraction", "2"],
            ["keep_fraction is 2", "above 0 and at most 1"],
            id="keep fraction 2",
        ),
        pytest.param(lambda folder: ["--data.train", jsonl(folder)], ["bad.jsonl"], id="empty data set"),
        pytest.param(
            lambda folder: ["--data.train", jsonl(folder, GOOD, {"prompt": "ab"})],
            ["bad.jsonl", "2", "completion"],
            id="record without a completion",
        ),
        pytest.param(
            lambda folder: ["--data.train", jsonl(folder, GOOD, {"prompt": "a" * 60, "completion": "b"})],
            ["bad.jsonl", "2", "max_length"],
            id="completion lost to truncation",
        ),
        pytest.param(
            lambda folder: ["--gate_importance.keep_fractoin", "0.5"],
            ["no option 'gate_importance.keep_fractoin'", "did you mean 'gate_importance.keep_fraction'?"],
            id="misspelt key",
        ),
    ],
)
def test_a_mistake_is_one_sentence_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make_arguments: Any, parts: list[str]
) -> None:
    records = write_records(tmp_path / "records.jsonl")
    options = {
        "model": {"model_name_or_path": saved_model(tmp_path / "base"), "lora": {"r": 2, "alpha": 4}},
        "data": {"train": records, "validation": records, "max_length": 40},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "default_root_dir": str(tmp_path / "run"),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        },
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(options))
    arguments = make_arguments(tmp_path)
    capsys.readouterr()
    assert main(["fit", "--config", str(config), *arguments]) == 2
    captured = capsys.readouterr().err
    assert "Traceback" not in captured
    (error,) = [line for line in captured.splitlines() if line.startswith("error: ")]
    for part in parts:
        assert part in error
    assert not list(tmp_path.glob("run/**/adapter"))
    assert not list(tmp_path.glob("run/**/*.ckpt"))
