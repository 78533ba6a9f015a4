"""LoRA that begins with what four bits lost of its base (LoftQ), and belongs to the base in those alone; on a CPU."""

from __future__ import annotations

import io
import json
import re
import runpy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from module_helpers import Batches, Fit, logits, quiet_trainer, saved_model, some_batches, tiny_model
from peft import LoraConfig, get_peft_model, replace_lora_weights_loftq
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoModelForCausalLM

from na_lora_lightning import (
    AdapterOptions,
    DualEncoderLightningModule,
    LoRAOptions,
    NALoRALightningModule,
    QuantizationOptions,
)
from na_lora_lightning.base_quantization import BaseQuantization
from na_lora_lightning.checkpoints.adapter_state import write_adapter_folder
from na_lora_lightning.cli.main import main
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.models import loftq, saved_adapter
from na_lora_lightning.models.loading import load_base_model
from na_lora_lightning.models.source import BaseModelSource

pytestmark = [
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
    # The library's own.
    pytest.mark.filterwarnings("ignore:.*is deprecated"),
    # A resumed fit goes on in the folder of the first.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]
LOST = "began with what nf4 with double quantisation lost of its base (LoftQ), so that it is wrong on the base"
SETTINGS = "set quantization.kind to 'nf4' and quantization.double to true."


def begun(base: str, initialisation: bool | str = "loftq", double: bool = True, **lora: Any) -> Any:
    torch.manual_seed(1)
    module = NALoRALightningModule(
        base,
        LoRAOptions(**{"r": 4, "alpha": 12, "init_lora_weights": initialisation, **lora}),
        quantization=QuantizationOptions("nf4", double),
    )
    module.configure_model()
    return module


def layers_of(module: NALoRALightningModule) -> dict[str, Any]:
    named = module.peft_model.get_base_model().named_modules()
    return {name: layer for name, layer in named if hasattr(layer, "lora_A")}


@pytest.fixture
def fit(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Fit:
    """A fit on nf4 with LoftQ."""
    monkeypatch.chdir(tmp_path)
    fit = Fit(tmp_path, capsys)
    fit.options["model"]["quantization"] = {"kind": "nf4"}
    fit.options["model"]["lora"]["init_lora_weights"] = "loftq"
    fit.options["model"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}
    return fit


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each time that the base is loaded once more, to begin with what was lost of it."""
    loaded: list[str] = []
    original = loftq.load_base_model

    def load(source: Any, device: Any) -> Any:
        loaded.append(source.name_or_path)
        return original(source, device)

    monkeypatch.setattr(loftq, "load_base_model", load)
    return loaded


def adapter_of(fit: Fit) -> Path:
    return next(fit.folder.glob("run/**/adapter"))


def test_lora_begins_with_the_best_part_of_what_four_bits_lost(tmp_path: Path) -> None:
    base = saved_model(tmp_path)
    module, again, plain = (begun(base, kind, rank_pattern={"down_proj": 2}) for kind in ("loftq", "loftq", True))
    stored = dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    layers, others = layers_of(module), layers_of(again)
    assert len(layers) == 14
    for name, layer in layers.items():
        rank = 2 if "down_proj" in name else 4
        lost = stored[f"{name}.weight"] - dequantize_module_weight(layer.base_layer)
        left, values, right = torch.linalg.svd(lost, full_matrices=False)
        best = left[:, :rank] * values[:rank] @ right[:rank]
        torch.testing.assert_close(layer.get_delta_weight("default"), best, rtol=0, atol=1e-6)
        # By Eckart and Young no matrix of the rank leaves less.
        rest = (lost - best).square().sum()
        assert 0.3 * lost.square().sum() < rest < 0.75 * lost.square().sum()
        for part in ("lora_A", "lora_B"):
            weights = (getattr(each[name], part)["default"].weight for each in (layers, others))
            assert torch.equal(*weights)
    expected = logits(AutoModelForCausalLM.from_pretrained(base))
    error, without = ((logits(each.peft_model) - expected).square().sum() for each in (module, plain))
    assert error < 0.9 * without
    # To PEFT it is LoRA as any other, or it would quantise the base by itself.
    assert module.peft_model.peft_config["default"].init_lora_weights is True


def test_where_lora_is_not_scaled_it_is_the_start_of_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved_model(tmp_path)
    ours, theirs = begun(base, alpha=4), begun(base, True, alpha=4)
    to = torch.Tensor.to
    # For which PEFT has a GPU do it.
    monkeypatch.setattr(
        torch.Tensor,
        "to",
        lambda self, *places, **options: to(self, *places, **{n: v for n, v in options.items() if v != "cuda"}),
    )
    replace_lora_weights_loftq(theirs.peft_model, str(tmp_path / "model.safetensors"))
    for name, layer in layers_of(ours).items():
        for part in ("lora_A", "lora_B"):
            first, second = (getattr(each, part)["default"].weight for each in (layer, layers_of(theirs)[name]))
            torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


def test_a_rank_above_that_of_a_layer(tmp_path: Path) -> None:
    base = saved_model(tmp_path)
    module = begun(base, r=20, target_modules=["q_proj"])
    stored = AutoModelForCausalLM.from_pretrained(base)
    for name, layer in layers_of(module).items():
        lost = stored.get_submodule(name).weight - dequantize_module_weight(layer.base_layer)
        torch.testing.assert_close(layer.get_delta_weight("default"), lost, rtol=0, atol=1e-6)
        # The rest of the rank can still learn.
        assert bool(layer.lora_A["default"].weight[16:].all())
        assert not bool(layer.lora_B["default"].weight[:, 16:].any())


@pytest.mark.parametrize("double", [True, False])
def test_the_folder_says_to_which_base_the_adapter_belongs(tmp_path: Path, double: bool) -> None:
    module = begun(saved_model(tmp_path / "base"), double=double)
    quiet_trainer(tmp_path).fit(module, Batches(some_batches(3)))
    folder = tmp_path / "adapter"
    assert json.loads((folder / "base_quantization.json").read_text()) == {"kind": "nf4", "double": double}
    card = (folder / "README.md").read_text()
    assert "on any other, what was lost would count twice" in card
    single = "" if double else " --no_double_quantization"
    assert f'na-lora merge --adapter "adapter" --output merged --quantization nf4{single}\n' in card
    # What the card says of plain PEFT.
    (script,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    script = script.replace('"./base"', repr(str(tmp_path / "base"))).replace('"adapter"', repr(str(folder)))
    script = re.sub(r'"(\.\./)*[\w/.-]*base"', repr(str(tmp_path / "base")), script)
    (tmp_path / "use.py").write_text(script)
    loaded = runpy.run_path(str(tmp_path / "use.py"))["model"]
    torch.testing.assert_close(logits(loaded), logits(module.peft_model), rtol=0, atol=1e-6)
    # The next adapter in the folder is for any.
    write_adapter_folder(begun(str(tmp_path / "base"), True).peft_model, folder)
    assert not (folder / "base_quantization.json").exists()


def test_an_adapter_that_takes_the_place_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = begun(saved_model(tmp_path / "base"))
    write_adapter_folder(module.peft_model, tmp_path / "adapter", own_base=module.own_base)
    assert BaseQuantization.of_folder(tmp_path / "adapter") == BaseQuantization("nf4", True)
    monkeypatch.setattr("na_lora_lightning.checkpoints.adapter_state.exchange", lambda first, second: False)
    write_adapter_folder(module.peft_model, tmp_path / "adapter")
    assert BaseQuantization.of_folder(tmp_path / "adapter") is None


def test_a_merge_is_what_was_trained_or_refused(
    fit: Fit, starts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--trainer.max_epochs=1") == 0
    assert len(starts) == 1
    trained = NALoRALightningModule.load_from_checkpoint(fit.newest).peft_model
    changed = begun(fit.options["model"]["model_name_or_path"], r=2, alpha=4).peft_model
    assert (logits(trained) - logits(changed)).abs().max() > 1e-3
    del starts[:]
    for number, place in enumerate((adapter_of(fit), fit.newest)):
        merge = ["merge", "--adapter", str(place), "--output", str(fit.folder / f"merged{number}")]
        what = f"error: the {'checkpoint' if number else 'adapter'} '{place}' {LOST}"
        for options, held in (
            ([], "as it is stored"),
            (["--quantization", "fp4"], "in fp4 with double quantisation"),
            (["--quantization", "int8"], "in int8"),
            (["--quantization", "nf4", "--no_double_quantization"], "in nf4 without double quantisation"),
        ):
            capsys.readouterr()
            assert main([*merge, *options]) == 2
            assert capsys.readouterr().err.splitlines()[-1] == f"{what} {held}; give --quantization nf4."
        assert not (fit.folder / f"merged{number}").exists()
        assert main([*merge, "--quantization", "nf4"]) == 0
        merged = AutoModelForCausalLM.from_pretrained(fit.folder / f"merged{number}")
        torch.testing.assert_close(logits(merged), logits(trained), rtol=0, atol=1e-5)
    assert starts == []


def test_chat_is_with_the_base_to_which_it_belongs(
    fit: Fit, starts: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit("--trainer.max_epochs=1", "--model.quantization.double=false") == 0
    run = str(adapter_of(fit).parent)
    del starts[:]
    monkeypatch.setattr("sys.stdin", io.StringIO("1+1=\n"))
    capsys.readouterr()
    assert main(["chat", run, "--quantization", "nf4"]) == 2
    lost = LOST.replace("with double", "without double")
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: the adapter '{run}/adapter' {lost} in nf4 with double quantisation; give --quantization nf4 "
        "--no_double_quantization."
    )
    four_bits = ["--quantization", "nf4", "--no_double_quantization"]
    assert main(["chat", run, *four_bits, "--max_new_tokens", "3", "--compare"]) == 0
    assert starts == []


@pytest.mark.parametrize("command", ["validate", "test", "predict", "fit"])
def test_every_command_takes_the_adapter_on_its_base_alone(
    fit: Fit, starts: list[str], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert fit("--trainer.max_epochs=1") == 0
    adapter = adapter_of(fit)
    del starts[:]
    options = {"data": {**fit.options["data"], "test": fit.options["data"]["train"]}, "trainer": fit.options["trainer"]}
    options["data"]["predict"] = fit.options["data"]["train"]
    arguments = [command, "--config", fit.file("data.yaml", options), "--adapter", str(adapter)]
    arguments += ["--model.evaluation.max_new_tokens=2", "--trainer.max_epochs=1"]
    capsys.readouterr()
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line == f"error: the adapter '{adapter}' {LOST} as it is stored; {SETTINGS}"
    assert main([*arguments, "--model.quantization.kind=nf4"]) == 0
    assert starts == []
    if command == "fit":
        # What trains on belongs to the same base.
        folders = set(fit.folder.glob("run/**/adapter")) - {adapter}
        assert [BaseQuantization.of_folder(folder) for folder in folders] == [BaseQuantization("nf4", True)]


def test_a_resumed_fit_is_on_the_base_of_its_checkpoint(
    fit: Fit, starts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--trainer.max_epochs=2") == 0
    expected = (adapter_of(fit) / "adapter_model.safetensors").read_bytes()
    saved = fit.newest
    del starts[:]
    for options, message in (
        (["--model.quantization.kind=fp4"], f"the checkpoint {LOST} in fp4 with double quantisation; {SETTINGS}"),
        (
            ["--model.quantization.double=false"],
            f"the checkpoint {LOST} in nf4 without double quantisation; {SETTINGS}",
        ),
        (
            ["--model.lora.init_lora_weights=true"],
            "the checkpoint was trained with lora.init_lora_weights='loftq' and the current model has True; set "
            "lora as it was.",
        ),
        (
            ["--model.quantization.kind=null"],
            "lora.init_lora_weights='loftq' begins with what four bits lost of the base, and quantization.kind is "
            "None; set it to 'nf4' or 'fp4', or leave 'loftq' out.",
        ),
    ):
        for command in ("fit", "validate"):
            capsys.readouterr()
            assert main([command, "--config", "run.yaml", f"--ckpt_path={saved}", *options]) == 2
            (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
            assert line == f"error: {message}"
    for command in ("fit", "validate"):
        assert main([command, "--config", "run.yaml", f"--ckpt_path={saved}", "--trainer.max_epochs=2"]) == 0
    assert starts == []
    assert (max(fit.folder.glob("run/**/adapter")) / "adapter_model.safetensors").read_bytes() == expected
    # A fit of another run begins anew.
    assert fit("--trainer.max_epochs=1") == 0
    assert len(starts) == 1


def test_what_loftq_does_not_go_with_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = saved_model(tmp_path / "base")
    with pytest.raises(ConfigurationError, match=r"quantization\.kind is 'int8'; set it to 'nf4' or 'fp4', or leave"):
        NALoRALightningModule(base, LoRAOptions(init_lora_weights="loftq"), quantization=QuantizationOptions("int8"))
    with pytest.raises(ConfigurationError, match=r"dual encoders are not quantised here; use 'orthogonal' or true\.$"):
        DualEncoderLightningModule(base, lora=LoRAOptions(init_lora_weights="loftq"))
    with pytest.raises(ConfigurationError, match=r"lora\.use_dora does not go with init_lora_weights='loftq'"):
        LoRAOptions(init_lora_weights="loftq", use_dora=True)
    with pytest.raises(ConfigurationError, match=r"found no LoRA on quantised weights of '.*'; leave it out\.$"):
        begun(base, target_modules=["lm_head"])
    load_base_model(BaseModelSource(base, quantization=QuantizationOptions("nf4")), None).save_pretrained(
        tmp_path / "stored"
    )
    with (
        pytest.warns(UserWarning, match="You passed `quantization_config`"),
        pytest.raises(
            ConfigurationError, match=r"is stored quantised \(bitsandbytes\); give the model that it was made from\.$"
        ),
    ):
        begun(str(tmp_path / "stored"))
    inspect = ["inspect", base, "--lora.init_lora_weights", "loftq"]
    assert main(inspect) == 2
    assert "and quantization.kind is None; set it to 'nf4'" in capsys.readouterr().err
    assert main([*inspect, "--quantization", "nf4"]) == 0


def test_how_a_saved_adapter_began_is_not_asked_again(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base")
    own = begun(base)
    write_adapter_folder(own.peft_model, tmp_path / "own", own_base=own.own_base)
    write_adapter_folder(begun(base, True).peft_model, tmp_path / "plain")
    for folder, asked, began in (("own", "gaussian", "'loftq'"), ("plain", "loftq", "True")):
        with pytest.raises(
            ConfigurationError,
            match=rf"began with init_lora_weights={began}, and lora\.init_lora_weights is '{asked}'; leave it out\.$",
        ):
            NALoRALightningModule(
                base,
                LoRAOptions(init_lora_weights=asked),
                adapter=AdapterOptions(start=str(tmp_path / folder)),
                quantization=QuantizationOptions("nf4"),
            )
    # One that PEFT began has a base that PEFT makes.
    get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_config.json"
    config = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(ConfigurationError, match="has init_lora_weights='loftq', for which there is no option here"):
        saved_adapter.lora_of_adapter(tmp_path / "peft", LoRAOptions())
    if not torch.cuda.is_available():
        with pytest.raises(ConfigurationError, match="quantises its base again on a GPU, and there is none"):
            saved_adapter.with_adapter(tiny_model("llama"), tmp_path / "peft", base)
    (tmp_path / "own" / "base_quantization.json").write_text("[")
    with pytest.raises(ConfigurationError, match=r"base_quantization\.json of the adapter '.*' cannot be read"):
        saved_adapter.require_own_base(tmp_path / "own", QuantizationOptions())
