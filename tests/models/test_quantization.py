"""Base weights in quantised form: what trains, what is merged, what is refused; on a CPU."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from module_helpers import Batches, logits, quiet_trainer, saved_model, some_batches
from transformers import AutoModelForCausalLM

from na_lora_lightning import (
    GateImportanceCallback,
    LoRAOptions,
    NALoRALightningModule,
    ScheduleOptions,
    StepScaleCallback,
)
from na_lora_lightning.cli.main import main
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.models.fast_lora import lora_layer_report
from na_lora_lightning.models.quantization import QuantizationOptions
from na_lora_lightning.models.source import BaseModelSource

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
pytestmark = [
    # The libraries' own.
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore:Calling register_constant:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated"),
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
]
KINDS = [
    *(pytest.param(kind, marks=needs_bitsandbytes) for kind in ("nf4", "fp4", "int8")),
    pytest.param("torchao_int8", marks=needs_torchao),
]


def fitted(folder: Path, kind: Any, callbacks: bool = True, **options: Any) -> NALoRALightningModule:
    torch.manual_seed(0)
    module = NALoRALightningModule(
        saved_model(folder / "base"),
        LoRAOptions(r=2, alpha=4),
        optimizer=options.pop("optimizer", lambda parameters: torch.optim.AdamW(parameters, lr=5e-2)),
        schedule=ScheduleOptions(name="constant", warmup_fraction=0.0),
        quantization=QuantizationOptions(kind, **options),
    )
    mechanisms = [GateImportanceCallback(warmup_steps=0, keep_fraction=0.5), StepScaleCallback()] if callbacks else []
    quiet_trainer(folder, callbacks=mechanisms).fit(module, Batches(some_batches(3)))
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_lora_trains_on_quantised_weights_which_stay_as_they_are(tmp_path: Path, kind: str) -> None:
    module = fitted(tmp_path, kind)
    weights = dict(module.peft_model.get_base_model().named_parameters())
    base = NALoRALightningModule(
        str(tmp_path / "base"), LoRAOptions(r=2, alpha=4), quantization=QuantizationOptions(kind)
    )
    base.configure_model()
    fresh = dict(base.peft_model.get_base_model().named_parameters())
    held = [name for name, weight in weights.items() if type(weight) is not torch.nn.Parameter]
    # q, k, v, o, gate, up and down of two layers.
    assert len(held) == 14
    for name in held:
        before, after = (getattr(entry[name], "tensor_impl", entry[name]) for entry in (fresh, weights))
        assert str(before) == str(after), name
    changed = [name for name, weight in weights.items() if "lora_B" in name and bool(weight.any())]
    assert len(changed) == 14
    # PEFT has layers of its own for them.
    report = lora_layer_report(module.peft_model)
    assert report.fast == ()
    assert sum(map(len, report.left.values())) == 14
    assert module.hparams["quantization"]["kind"] == kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_into_dequantised_weights_says_what_was_trained(tmp_path: Path, kind: str) -> None:
    module = fitted(tmp_path, kind)
    adapter, merged = str(tmp_path / "adapter"), str(tmp_path / "merged")
    status = main(["merge", "--adapter", adapter, "--output", merged, "--quantization", kind])
    assert status == 0
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    # bitsandbytes multiplies int8 by int8, inputs rounded too.
    tolerance = 2e-2 if kind == "int8" else 1e-5
    expected = logits(module.peft_model).float()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=tolerance)
    # A checkpoint of the fit is the same.
    module.trainer.save_checkpoint(tmp_path / "it.ckpt")
    of_checkpoint = ["--adapter", str(tmp_path / "it.ckpt"), "--output", str(tmp_path / "again")]
    assert main(["merge", *of_checkpoint, "--quantization", kind]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    # Into the weights as they are stored it is as near as those.
    assert main(["merge", "--adapter", adapter, "--output", str(tmp_path / "full")]) == 0
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    name = "model.layers.0.mlp.gate_proj"
    delta = module.peft_model.get_base_model().get_submodule(name).get_delta_weight("default")
    expected_weight = plain.get_submodule(name).weight + delta
    torch.testing.assert_close(full.get_submodule(name).weight, expected_weight, rtol=0, atol=1e-6)


@needs_bitsandbytes
def test_a_base_that_is_stored_quantised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import BitsAndBytesConfig

    saved_model(tmp_path / "plain")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config, device_map="cpu")
    saved_model(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "base")
    module = NALoRALightningModule(str(tmp_path / "base"), LoRAOptions(r=2, alpha=4))
    quiet_trainer(tmp_path).fit(module, Batches(some_batches(3)))
    merge = ["merge", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]
    assert main(merge) == 2
    assert "is quantised (bitsandbytes)" in capsys.readouterr().err
    assert main([*merge, "--dequantize"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(module.peft_model).float(), rtol=0, atol=1e-5)
    module.trainer.save_checkpoint(tmp_path / "it.ckpt")
    merge = ["merge", "--adapter", str(tmp_path / "it.ckpt"), "--output", str(tmp_path / "again")]
    assert main(merge) == 2
    assert "is quantised (bitsandbytes)" in capsys.readouterr().err
    assert main([*merge, "--dequantize"]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in merged.state_dict().items())
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "base"), "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["lora_layers"]
    assert layers["fast"] == []
    assert [len(names) for names in layers["left"].values()] == [14]


@needs_bitsandbytes
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit"])
def test_optimizers_of_bitsandbytes(tmp_path: Path, name: str) -> None:
    import bitsandbytes

    module = fitted(
        tmp_path, "nf4", optimizer=lambda parameters: getattr(bitsandbytes.optim, name)(parameters, lr=0.05)
    )
    changed = [entry for name, entry in module.peft_model.named_parameters() if "lora_B" in name and bool(entry.any())]
    assert len(changed) == 14


def test_what_a_fit_would_quantise_is_left_to_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", saved_model(tmp_path / "base"), "--quantization", "nf4"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "0 of 14 LoRA layers are computed as one function each." in printed
    assert "its weights are quantised (nf4), which PEFT has layers of its own for" in printed


def test_mistakes_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"quantization.kind='nf5' is unknown; use one of 'nf4'"):
        QuantizationOptions("nf5")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"quantization.compute_dtype='int' is unknown"):
        QuantizationOptions(compute_dtype="int")  # type: ignore[arg-type]

    def missing(name: str) -> str:
        from importlib.metadata import PackageNotFoundError

        raise PackageNotFoundError(name)

    monkeypatch.setattr("na_lora_lightning.models.quantization.version", missing)
    with pytest.raises(ConfigurationError, match=r"'nf4' needs the package bitsandbytes, .*\[quantization\]"):
        QuantizationOptions("nf4")
    assert BaseModelSource("x").quantization == QuantizationOptions()
