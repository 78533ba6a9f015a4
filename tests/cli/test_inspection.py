"""``na-lora inspect`` on tiny models: the table, the JSON, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from module_helpers import saved_model
from transformers import LlamaConfig
from zoo.tiny_models import build

from na_lora_lightning.arguments import LoRAOptions
from na_lora_lightning.cli.inspect import inspect_model
from na_lora_lightning.cli.main import main
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.experts import expert_owners
from na_lora_lightning.core.sites import GateMap
from na_lora_lightning.models.lora import add_lora
from na_lora_lightning.models.source import BaseModelSource


def test_json_lists_every_site_with_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", saved_model(tmp_path), "--json", "--lora.r", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["channels"] == 48
    assert found["left_out"] == []
    assert found["sites"][1] == {
        "name": "model.layers.1.mlp.act_fn",
        "layer": 1,
        "part": None,
        "kind": "gated",
        "activation": "silu",
        "self_gated": True,
        "channels": 24,
        "experts": None,
        "observed_at": "input of the activation module",
        "lora_layer": "model.layers.1.mlp.gate_proj",
        "parameter": None,
        "rows": "0:24",
        "rank": {"default": 3},
        "output_layer": "model.layers.1.mlp.down_proj",
        "found_by": "probe",
    }


def test_the_table_shows_activation_channels_and_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", saved_model(tmp_path, "gpt2")]) == 0
    printed = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert lines[0] == "2 gate sites, 128 gate channels"
    # Both layers in one line, and no column for experts or parts.
    assert "layers activation kind channels LoRA layer rows of B rank" in lines
    assert "0-1 gelu_tanh plain 64 …mlp.c_fc 0:64 16" in lines
    assert any(line.startswith("LoRA trains ") and line.endswith(" %).") for line in lines)
    assert max(map(len, printed.splitlines())) <= 80


def saved_config(model_type: str, folder: Path, **values: Any) -> str:
    build("causal-lm", model_type, **values).model.config.save_pretrained(folder)
    return str(folder)


def test_a_configuration_alone_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved_config("deepseek_v3", tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert main(["inspect", folder, "--json"]) == 0
    sites = json.loads(capsys.readouterr().out)["sites"]
    assert [(site["channels"], site["experts"], site["parameter"]) for site in sites] == [
        (24, None, "weight"),
        (20, 4, "gate_up_proj"),
        (20, None, "weight"),
        (20, 4, "gate_up_proj"),
        (20, None, "weight"),
    ]


# Thirty-two blocks of 8 billion parameters would be 32 GB of weights; this takes seconds and no such memory.
def test_a_large_model_is_inspected_at_its_real_sizes(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    config.save_pretrained(tmp_path)
    gates = inspect_model(BaseModelSource(str(tmp_path)), LoRAOptions())
    assert [(site.channels, site.row_slice) for site in gates] == [(14_336, slice(0, 14_336, 1))] * 4


@pytest.mark.parametrize(
    "model_type",
    [
        "gpt2",
        "phi3",
        "gpt_oss",
        "lfm2",
        "falcon_h1",
        "zamba2",
        "nemotron_h",
        "llama4_text",
        "rwkv",
        "openai-gpt",
        "opt",
    ],
)
def test_without_weights_the_same_is_found_as_with_them(model_type: str, tmp_path: Path) -> None:
    tiny = build("causal-lm", model_type)
    tiny.model.config.save_pretrained(tmp_path)
    source = BaseModelSource(str(tmp_path))
    tiny.model.name_or_path = source.resolved_name_or_path
    lora = LoRAOptions(r=2, target_parameters="all-experts" if list(expert_owners(tiny.model)) else None)

    def facts(gates: GateMap) -> list[tuple[object, ...]]:
        return [
            (site.name, site.kind, site.activation.name, site.channels, site.networks, site.row_slice, site.found_by)
            for site in gates.require()
        ]

    found = facts(inspect_model(source, lora))
    assert found
    assert found == facts(discover_gates(add_lora(tiny.model, lora, source)))


def test_experts_and_learnt_activations_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved_config("gpt_oss", tmp_path / "experts")
    assert main(["inspect", folder, "--lora.target_parameters", "all-experts"]) == 0
    printed = capsys.readouterr().out
    assert "quick_gelu" in printed
    assert "0:47:2" in printed
    assert main(["inspect", saved_config("apertus", tmp_path / "learnt")]) == 0
    assert capsys.readouterr().out.replace("\n", " ").count("not self-gated") == 1


def test_experts_without_lora_are_named_with_the_option_to_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", saved_config("gpt_oss", tmp_path)]) == 2
    assert "add 'gate_up_proj' to the LoRA target parameters" in capsys.readouterr().err


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
    assert capsys.readouterr().err.startswith("error: the model folder './no/such/folder' does not exist")


@pytest.mark.parametrize("value", ['"x"', "-1", "null"])
def test_a_configuration_with_wrong_values_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": ' + value + "}")
    assert main(["inspect", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: the model {str(tmp_path)!r} cannot be made from its configuration (")
    assert error.count("\n") == 1


def test_misspelt_options_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path), "--lora.ranks", "3"]) == 2
    assert capsys.readouterr().err == "error: there is no option 'lora.ranks'; did you mean 'lora.r'?\n"
