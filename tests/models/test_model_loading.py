from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from module_helpers import saved_model, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from zoo.tiny_models import build

from na_lora_lightning.arguments import LoRAOptions
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.models.loading import enable_gradient_checkpointing, load_base_model
from na_lora_lightning.models.lora import add_lora
from na_lora_lightning.models.source import BaseModelSource, require_model, resolve_dtype

CPU = torch.device("cpu")


def adapted_layers(model: torch.nn.Module) -> set[str]:
    return {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_modules() if ".lora_A" in name}


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", "auto"),
        ("auto", "mps", torch.float32),
        ("auto", None, "auto"),
        ("bfloat16", "cpu", torch.bfloat16),
        ("float32", "cuda", torch.float32),
    ],
)
def test_dtype(dtype: Any, device: str | None, expected: Any) -> None:
    assert resolve_dtype(dtype, None if device is None else torch.device(device)) == expected


def test_auto_dtype_is_float32_on_the_cpu_and_the_checkpoints_on_cuda(tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    source = BaseModelSource(str(tmp_path))
    assert load_base_model(source, CPU).dtype == torch.float32
    assert load_base_model(source, torch.device("cuda")).dtype == torch.bfloat16


def test_attention_implementation_is_passed_on(tmp_path: Path) -> None:
    saved_model(tmp_path)
    model = load_base_model(BaseModelSource(str(tmp_path), attention_implementation="eager"), CPU)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
    ],
)
def test_all_linear_is_every_layer_but_the_head(tmp_path: Path, kind: str, layers: set[str]) -> None:
    source = BaseModelSource(saved_model(tmp_path, kind))
    model = add_lora(load_base_model(source, CPU), LoRAOptions(r=2), source)
    assert adapted_layers(model) == layers
    assert model.training


def test_options_reach_peft(tmp_path: Path) -> None:
    source = BaseModelSource(saved_model(tmp_path))
    lora = LoRAOptions(
        r=2,
        alpha=3,
        dropout=0.25,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[1],
        rank_pattern={"v_proj": 4},
        use_rslora=True,
    )
    model = add_lora(load_base_model(source, CPU), lora, source)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if "lora_A" in name}
    prefix = "base_model.model.model.layers.1.self_attn"
    assert shapes == {
        f"{prefix}.q_proj.lora_A.default.weight": (2, 16),
        f"{prefix}.v_proj.lora_A.default.weight": (4, 16),
    }
    layer = model.get_submodule(f"{prefix}.q_proj")
    assert layer.scaling["default"] == pytest.approx(3 / 2**0.5)
    assert layer.lora_dropout["default"].p == 0.25


def test_unknown_layers_are_refused_in_one_sentence(tmp_path: Path) -> None:
    source = BaseModelSource(saved_model(tmp_path))
    with pytest.raises(ConfigurationError, match=r"has 'not_there', and the model has no such layer") as caught:
        add_lora(load_base_model(source, CPU), LoRAOptions(target_modules=["not_there"]), source)
    assert "\n" not in str(caught.value)


def test_olora_on_transposed_weights_is_refused(tmp_path: Path) -> None:
    source = BaseModelSource(saved_model(tmp_path, "gpt2"))
    with pytest.raises(ConfigurationError, match="'olora' does not work for the Conv1D layers"):
        add_lora(load_base_model(source, CPU), LoRAOptions(r=2, init_lora_weights="olora"), source)


def saved_mixture(folder: Path) -> BaseModelSource:
    build("causal-lm", "deepseek_v3").model.save_pretrained(folder)
    return BaseModelSource(str(folder))


def test_dense_layers_beside_experts_get_lora_as_well(tmp_path: Path) -> None:
    source = saved_mixture(tmp_path)
    model = add_lora(load_base_model(source, CPU), LoRAOptions(r=2), source)
    adapted = {name.split(".lora_B.")[0].removeprefix("base_model.model.model.layers.") for name in lora_b_names(model)}
    for layer, block in ((0, "mlp"), (1, "mlp.shared_experts"), (2, "mlp.shared_experts")):
        assert {f"{layer}.{block}.{name}_proj" for name in ("gate", "up", "down")} <= adapted
    assert {"1.mlp.experts", "1.mlp.experts.base_layer", "2.mlp.experts", "2.mlp.experts.base_layer"} <= adapted


def lora_b_names(model: torch.nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if ".lora_B." in name and parameter.requires_grad]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, r"lora\.dropout=0\.1 does not work for LoRA on parameters"),
        ({"use_dora": True}, r"lora\.use_dora=True does not work"),
        ({"init_lora_weights": "pissa"}, r"lora\.init_lora_weights='pissa' does not work"),
        ({"layers_to_transform": [1], "target_modules": ["gate_proj", "up_proj"]}, r"lora\.layers_to_transform=\[1\]"),
        ({"target_parameters": "experts"}, r"lora\.target_parameters='experts' is neither a list of names nor"),
        ({"target_modules": ["gate_proj"]}, r"without also targeting up_proj"),
    ],
)
def test_what_parameters_do_not_take_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = saved_mixture(tmp_path)
    with pytest.raises(ConfigurationError, match=message):
        add_lora(load_base_model(source, CPU), LoRAOptions(r=2, **options), source)


def test_all_experts_of_a_model_without_any_is_refused(tmp_path: Path) -> None:
    source = BaseModelSource(saved_model(tmp_path))
    with pytest.raises(ConfigurationError, match="has no stacked experts"):
        add_lora(load_base_model(source, CPU), LoRAOptions(r=2, target_parameters="all-experts"), source)


def test_gradient_checkpointing_is_refused_where_there_is_none(tmp_path: Path) -> None:
    model = tiny_model("llama")
    type(model).supports_gradient_checkpointing, before = False, type(model).supports_gradient_checkpointing
    try:
        with pytest.raises(ConfigurationError, match="does not support gradient checkpointing"):
            enable_gradient_checkpointing(model)
    finally:
        type(model).supports_gradient_checkpointing = before


def refused(name: str, **options: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_base_model(BaseModelSource(name, **options), CPU)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refused(str(tmp_path / "missing"))
    assert "does not exist" in refused("./missing")
    assert "does not exist" in refused("a/b/c")
    assert "does not exist" in refused("")
    assert "config.json is missing" in refused(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert "cannot be loaded" in refused(str(tmp_path))


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    assert "holds a LoRA adapter" in refused(str(tmp_path))


def test_incomplete_and_pickled_weights_are_refused(tmp_path: Path) -> None:
    saved_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "lacks weights (such as 'model.norm.weight')" in refused(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert "safetensors" in refused(str(tmp_path))


def test_an_unreachable_hub_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_connection(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "model_info", no_connection)
    started = time.perf_counter()
    assert "the hub, which may have a model of that name, cannot be reached" in refused("somebody/some-model")
    assert time.perf_counter() - started < 2


def test_hub_answers_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import errors

    def answering(kind: Any) -> None:
        def fail(*_: Any, **__: Any) -> None:
            # Their constructors want a response of whichever HTTP library is in use.
            raise kind.__new__(kind)

        monkeypatch.setattr(HfApi, "model_info", fail)

    answering(errors.RepositoryNotFoundError)
    assert "neither a folder nor a hub model" in refused("somebody/some-model")
    answering(errors.GatedRepoError)
    assert "accept its terms" in refused("somebody/some-model")
    answering(errors.RevisionNotFoundError)
    assert "no revision 'v9'" in refused("somebody/some-model", revision="v9")
    assert "neither a folder nor a hub model" in refused("not a name!")


def test_a_model_on_the_hub_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: None)
    require_model(BaseModelSource("somebody/some-model"))
