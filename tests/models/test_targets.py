"""Targets: every layer that is meant gets LoRA, in a form in which plain ``peft`` loads the adapter again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM
from zoo.tiny_models import build

from na_lora_lightning.core.experts import expert_owners
from na_lora_lightning.models.targets import LoRATargets, expert_parameters, lora_targets, mark_transposed_experts


def config_of(targets: LoRATargets, **options: Any) -> LoraConfig:
    return LoraConfig(
        r=2,
        task_type="CAUSAL_LM",
        target_modules=targets.target_modules,
        target_parameters=targets.target_parameters,
        exclude_modules=targets.exclude_modules,
        **options,
    )


def linear_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}


def test_a_dense_model_keeps_its_targets() -> None:
    assert lora_targets(tiny_llama(), ["q_proj"]) == LoRATargets(["q_proj"], None, None)
    assert lora_targets(tiny_llama()) == LoRATargets("all-linear", None, None)
    assert lora_targets(tiny_llama(), "all-linear", "all-experts") == LoRATargets("all-linear", None, None)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_moe", "glm4_moe", "mixtral", "hunyuan_v1_moe"])
def test_all_linear_reaches_every_linear_layer_and_all_experts(model_type: str) -> None:
    model = build("causal-lm", model_type).model
    wanted, owners = linear_names(model), [name for name, _, _ in expert_owners(model)]
    assert owners
    peft_model = get_peft_model(model, config_of(lora_targets(model, "all-linear", "all-experts")))
    adapted = {
        name.removeprefix("base_model.model.").split(".lora_B")[0].removesuffix(".base_layer")
        for name, _ in peft_model.named_parameters()
        if ".lora_B." in name
    }
    assert adapted == {*wanted, *owners}


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss", "nemotron_h", "mixtral"])
def test_plain_peft_loads_and_merges_such_an_adapter(model_type: str, tmp_path: Path) -> None:
    tiny = build("causal-lm", model_type)
    tiny.model.save_pretrained(tmp_path / "base")
    model = get_peft_model(tiny.model, config_of(lora_targets(tiny.model, "all-linear", "all-experts")))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    inputs = {name: value for name, value in tiny.inputs.items() if name != "labels"}
    with torch.no_grad():
        wanted = model.eval()(**inputs).logits
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        assert float((base(**inputs).logits - wanted).abs().max()) > 0.1
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert torch.equal(loaded(**inputs).logits, wanted)
        torch.testing.assert_close(loaded.merge_and_unload()(**inputs).logits, wanted, rtol=1e-4, atol=1e-5)


def test_transposed_experts_are_told_by_their_shapes() -> None:
    llama4 = build("causal-lm", "llama4_text").model
    mark_transposed_experts(llama4)
    assert {owner.is_transposed for _, owner, _ in expert_owners(llama4)} == {True}
    longcat = build("causal-lm", "longcat_flash").model
    mark_transposed_experts(longcat)
    assert not any(hasattr(owner, "is_transposed") for _, owner, _ in expert_owners(longcat))


def test_names_of_experts_are_short() -> None:
    assert expert_parameters(build("causal-lm", "mixtral").model) == ["experts.down_proj", "experts.gate_up_proj"]
    shared = expert_parameters(build("causal-lm", "inkling_text").model)
    assert {name.rsplit(".", 1)[-1] for name in shared} == {"gate_up_proj", "down_proj", "gate_proj", "up_proj"}


@pytest.mark.parametrize(
    ("model_type", "left_out"),
    [("falcon_h1", "out_proj"), ("llama4_text", "router"), ("deepseek_v4", "o_a_proj")],
)
def test_all_linear_leaves_out_what_cannot_be_adapted(model_type: str, left_out: str) -> None:
    tiny = build("causal-lm", model_type)
    targets = lora_targets(tiny.model, "all-linear", exclude_modules=["nothing"])
    assert targets.exclude_modules is not None
    assert {name.rsplit(".", 1)[-1] for name in targets.exclude_modules} == {"nothing", left_out}
    targets = lora_targets(tiny.model, "all-linear", exclude_modules="nothing")
    model = get_peft_model(tiny.model, config_of(targets))
    assert not any(f".{left_out}.lora_" in name for name, _ in model.named_parameters())
    model(**tiny.inputs).loss.backward()
