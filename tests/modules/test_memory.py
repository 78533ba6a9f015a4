"""The memory of a training step: what shapes alone say is what the allocator hands out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from module_helpers import saved_model
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig
from zoo.tiny_models import build

from na_lora_lightning.arguments import LoRAOptions
from na_lora_lightning.cli.main import main
from na_lora_lightning.models.loading import enable_gradient_checkpointing
from na_lora_lightning.models.lora import add_lora
from na_lora_lightning.models.source import BaseModelSource, auto_class
from na_lora_lightning.modules.losses import token_sums
from na_lora_lightning.modules.memory import MemoryEstimate, batch_of_size, estimate_memory

LORA = LoRAOptions(r=4)
SIZES = {"vocab_size": 5000, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def saved_llama(folder: Path) -> Any:
    config = LlamaConfig(**SIZES, **HEADS, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    return config


def allocated(config: Any, batch: dict[str, Any], logits: Any, checkpointing: bool) -> tuple[int, int]:
    """The bytes of parameters and buffers, and the most that a forward and backward pass adds to them."""
    base = auto_class(config).from_config(config).eval()
    base.name_or_path = "here"
    if checkpointing:
        enable_gradient_checkpointing(base)
    model = add_lora(base, LORA, BaseModelSource("here"))
    # What is looked at once and kept.
    token_sums(model, batch, logits, count_correct=False).mean_loss.backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss = token_sums(model, batch, logits, count_correct=False).mean_loss
        model.zero_grad()
        loss.backward()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]), most


@pytest.mark.parametrize(
    ("logits", "checkpointing"), [("auto", False), ("all", False), ("targets", True)], ids=lambda value: str(value)
)
def test_it_is_what_the_allocator_hands_out(tmp_path: Path, logits: Any, checkpointing: bool) -> None:
    config, batch = saved_llama(tmp_path), batch_of_size(4, 128)
    found = estimate_memory(
        BaseModelSource(str(tmp_path)), LORA, batch, logits=logits, gradient_checkpointing=checkpointing
    )
    parameters, most = allocated(config, batch, logits, checkpointing)
    assert found.weights + found.adapters == parameters
    assert found.gradients == found.adapters
    assert found.optimizer == 2 * found.adapters
    held_before = parameters + found.gradients + found.optimizer
    assert found.peak - held_before == pytest.approx(most, rel=0.06)
    parts = asdict(found)
    assert parts.pop("peak") == sum(parts.values())


def test_more_records_longer_ones_and_recomputed_blocks(tmp_path: Path) -> None:
    saved_llama(tmp_path)
    source = BaseModelSource(str(tmp_path))

    def activations(records: int, length: int, checkpointing: bool = False) -> int:
        batch = batch_of_size(records, length)
        return estimate_memory(source, LORA, batch, gradient_checkpointing=checkpointing).activations

    assert activations(4, 64) == pytest.approx(2 * activations(2, 64), rel=0.05)
    assert activations(2, 128) > 1.9 * activations(2, 64)
    assert activations(4, 64, checkpointing=True) < 0.6 * activations(4, 64)
    half = estimate_memory(source, LORA, batch_of_size(2, 64), dtype=torch.bfloat16)
    whole = estimate_memory(source, LORA, batch_of_size(2, 64))
    assert half.weights == pytest.approx(whole.weights / 2, rel=1e-4)
    assert half.adapters == whole.adapters
    four = estimate_memory(source, LORA, batch_of_size(2, 64), quantized="nf4")
    # Of a layer: q and o, k and v, and three matrices of the feed-forward block.
    linear = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    assert whole.weights - four.weights == whole.peak - four.peak == linear * (32 - 4.5) / 8


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "gpt_oss", "gemma3_text"])
def test_models_of_other_kinds(model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build("causal-lm", model_type).model
    model.config.save_pretrained(tmp_path)
    experts = ["--lora.target_parameters", "all-experts"] if model_type in ("mixtral", "gpt_oss") else []
    sizes = ["--lora.r", "2", "--batch_size", "2", "--length", "16"]
    assert main(["inspect", str(tmp_path), "--json", *experts, *sizes]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["weights"] >= sum(parameter.nbytes for parameter in model.parameters())
    assert memory["peak"] > memory["weights"] + 4 * memory["adapters"]


def test_inspect_takes_the_options_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_llama(tmp_path)
    run = tmp_path / "run.yaml"
    run.write_text(
        f"model: {{model_name_or_path: {tmp_path}, lora: {{r: 4}}, loss: {{logits: all}}, dtype: bfloat16}}\n"
        "data: {batch_size: 3, max_length: 32}\ntrainer: {max_epochs: 1}\n"
    )
    assert main(["inspect", "--config", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "A training step with 3 × 32 tokens, in bfloat16 on a " in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert main(["inspect", "--config", str(run), "--length", "16", "--lora.r", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sites"][0]["rank"] == {"default": 8}
    source, options = BaseModelSource(str(tmp_path)), {"dtype": torch.bfloat16, "logits": "all"}
    assert found["memory"] == asdict(
        estimate_memory(source, LoRAOptions(r=8), batch_of_size(3, 16), **options)  # type: ignore[arg-type]
    )


def test_what_cannot_be_estimated_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved_model(tmp_path)
    capsys.readouterr()
    assert main(["inspect", model, "--batch_size", "0"]) == 2
    assert capsys.readouterr().err == "error: batch_size is 0; set it to at least 1.\n"
    assert main(["inspect", model, "--config", str(tmp_path / "none.yaml")]) == 2
    assert "is not the configuration of a run with a model" in capsys.readouterr().err
    assert main(["inspect"]) == 2
    assert capsys.readouterr().err == "error: no model is given; give its folder or its name on the hub.\n"
    assert main(["inspect", model, "--memory", "false"]) == 0
    assert "training step" not in capsys.readouterr().out


def test_sizes_are_said_with_three_digits() -> None:
    sizes = {"weights": 3 << 29, "adapters": 5 << 20, "gradients": 5 << 20, "optimizer": 10 << 20, "logits": 1 << 28}
    estimate = MemoryEstimate(peak=5 << 30, **sizes, activations=(5 << 30) - sum(sizes.values()))
    assert str(estimate) == (
        "5.0 GiB: activations 3.2 GiB, weights 1.5 GiB, logits 256 MiB, optimizer 10 MiB, adapters 5 MiB, "
        "gradients 5 MiB"
    )
