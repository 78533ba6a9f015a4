"""Targets: every layer that is meant gets LoRA, and a name that does nothing is an error that says which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import tiny_gpt2, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM
from zoo.tiny_models import build

from na_lora_lightning.arguments import LoRAOptions
from na_lora_lightning.core.experts import expert_owners
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.models.lora import add_lora
from na_lora_lightning.models.source import BaseModelSource
from na_lora_lightning.models.target_names import UnmatchedNameWarning
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


def add(model: Any, **options: Any) -> Any:
    model.name_or_path = "tiny"
    return add_lora(model, LoRAOptions(r=2, **options), BaseModelSource("tiny"))


ONE = {"target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["q_proj", "v_porj"]},
            "lora.target_modules has 'v_porj', and the model has no such layer; did you mean 'v_proj' or ",
        ),
        (
            {"target_modules": ["q_proj", "xyz"]},
            "has 'xyz', and the model has no such layer; its layers are embed_tokens, q_proj, k_proj, v_proj, ",
        ),
        (
            {"target_modules": ["q_proj", "mlp"]},
            r"has 'mlp', which is 'model.layers.0.mlp', a LlamaMLP, to which LoRA cannot be added; name layers inside "
            r"it \(gate_proj, up_proj, down_proj\)",
        ),
        (
            {"target_modules": ["q_proj", "input_layernorm"]},
            "a LlamaRMSNorm, to which LoRA cannot be added; name linear layers",
        ),
        ({"target_modules": ["all-linear"]}, "has 'all-linear' in a list; set lora.target_modules to that word alone"),
        (
            {"target_modules": "q_proj"},
            r"is 'q_proj', a regular expression that no layer's whole name matches; names are given in a list: "
            r"\[q_proj\]",
        ),
        ({"target_modules": "q_proj, v_proj"}, r"names are given in a list: \[q_proj, v_proj\]"),
        ({"target_modules": r".*\.queries"}, "names are such as 'model.layers.0.self_attn.q_proj'"),
        ({"target_modules": r".*\.(q_proj"}, r"has '\.\*\\\\\.\(q_proj', which is not a valid regular expression"),
        ({"exclude_modules": ["donw_proj"]}, "lora.exclude_modules has 'donw_proj', .*did you mean 'down_proj'"),
        ({"exclude_modules": r".*\.nothing"}, "lora.exclude_modules is '.*', a regular expression that no layer's"),
        ({**ONE, "modules_to_save": ["lm_haed"]}, "lora.modules_to_save has 'lm_haed', .*did you mean 'lm_head'"),
        (
            {**ONE, "target_parameters": ["up_proj.wieght"]},
            "lora.target_parameters has 'up_proj.wieght', and the model has no such parameter; did you mean "
            "'up_proj.weight'",
        ),
        (
            {**ONE, "rank_pattern": {"v_proj": 4}},
            "lora.rank_pattern has 'v_proj', and the model has no such layer with LoRA; did you mean 'q_proj'",
        ),
        ({**ONE, "alpha_pattern": {"q_porj": 4}}, "lora.alpha_pattern has 'q_porj', .*did you mean 'q_proj'"),
        ({**ONE, "rank_pattern": {"q_(": 4}}, "lora.rank_pattern has .* which is not a valid regular expression"),
        (
            {**ONE, "layers_to_transform": [0, 2]},
            "lora.layers_to_transform has 2, and no layer of that number has a target; the model's blocks are numbered "
            "from 0 to 1",
        ),
        (
            {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
            r"has 'v_proj', of which other options leave nothing \(lora.exclude_modules, lora.parts\)",
        ),
    ],
)
def test_names_that_do_nothing_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        add(tiny_llama(), **options)


def test_a_word_of_an_expression_is_named_too() -> None:
    with pytest.warns(UnmatchedNameWarning, match="no layer's name has 'v_porj'; correct it if it is misspelt"):
        add(tiny_llama(), target_modules=r".*\.(q_proj|v_porj)")


def test_all_linear_goes_with_numbers_of_layers() -> None:
    model = add(tiny_llama(), layers_to_transform=[1])
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_B." in name}
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert adapted == {f"base_model.model.model.layers.1.{name}" for name in names}


def test_an_expression_beside_numbers_of_layers_is_one_sentence() -> None:
    with pytest.raises(ConfigurationError, match="`layers_to_transform` cannot be used when `target_modules` is a str"):
        add(tiny_llama(), target_modules=r".*q_proj", layers_to_transform=[1])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers_to_transform": [1]},
        {"target_modules": ["self_attn.q_proj", "layers.0.mlp.up_proj"]},
        {"target_modules": r".*\.\d+\.self_attn\.(q|v)_proj"},
        {"target_modules": r"^(?!.*vision).*q_proj"},
        {"exclude_modules": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"^model.layers.0.*": 4}},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"], "target_parameters": ["down_proj.weight"]},
    ],
)
def test_right_names_are_taken(options: dict[str, Any]) -> None:
    assert any("lora" in name for name, _ in add(tiny_llama(), **options).named_parameters())


def test_conv1d_and_names_of_stacked_experts_are_right_names() -> None:
    add(tiny_gpt2(), target_modules=["c_attn", "wte"])
    add(build("causal-lm", "mixtral").model, target_modules=["q_proj", "w1", "w2", "w3"])
    with pytest.raises(ConfigurationError, match="w1 without also targeting w3"):
        add(build("causal-lm", "mixtral").model, target_modules=["q_proj", "w1"])


def test_a_name_of_another_part_says_so() -> None:
    model = build("image-text-to-text", "llava").model
    with pytest.raises(ConfigurationError, match=r"has 'fc1', of which other options leave nothing \(lora.parts\)"):
        add(model, target_modules=["q_proj", "fc1"])
