"""``na-lora inspect`` on tiny models: the table, the JSON, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from module_helpers import saved_model

from na_lora_lightning.cli import main


def test_json_lists_every_site_with_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", saved_model(tmp_path), "--json", "--lora.r", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["channels"] == 48
    assert found["left_out"] == []
    assert found["sites"][1] == {
        "name": "model.layers.1.mlp.act_fn",
        "layer": 1,
        "kind": "gated",
        "activation": "silu",
        "self_gated": True,
        "channels": 24,
        "lora_layer": "model.layers.1.mlp.gate_proj",
        "rows": "0:24",
        "rank": {"default": 3},
        "output_layer": "model.layers.1.mlp.down_proj",
        "found_by": "probe",
    }


def test_the_table_shows_activation_channels_and_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", saved_model(tmp_path, "gpt2")]) == 0
    printed = capsys.readouterr().out
    assert "2 gate sites, 128 gate channels" in printed
    for expected in ("gelu_tanh", "plain", "0:64"):
        assert printed.count(expected) == 2


def test_gates_without_lora_are_shown_and_then_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved_model(tmp_path)
    capsys.readouterr()
    assert main(["inspect", model, "--lora.target_modules", "[q_proj]"]) == 2
    captured = capsys.readouterr()
    assert "2 activations left out" in captured.out
    assert captured.err.startswith("error: none of the model's 2 gates has LoRA")
    assert captured.err.count("\n") == 1


def test_an_unknown_folder_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "./no/such/folder"]) == 2
    assert capsys.readouterr().err.startswith("error: The model folder './no/such/folder' does not exist")
