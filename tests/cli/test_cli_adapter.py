"""Adapters that are there already: ``--adapter`` in every command, and the folder of a run in their place."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from module_helpers import Fit, saved_model, tiny_model, trained
from peft import LoHaConfig, get_peft_model
from safetensors.torch import load_file

from na_lora_lightning import AdapterOptions, LoRAOptions, NALoRALightningModule
from na_lora_lightning.cli.main import main
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.models.saved_adapter import lora_of_adapter


@pytest.fixture
def fit(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Fit:
    monkeypatch.chdir(tmp_path)
    return Fit(tmp_path, capsys)


def run_of(fit: Fit) -> Path:
    """The folder of the run that is first."""
    return next(fit.folder.glob("run/**/version_0"))


def test_an_adapter_is_measured_used_and_trained_on(
    fit: Fit, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}}
    fit.options["model"].update(optimizer=optimizer, lora={"r": 3, "alpha": 5, "use_rslora": True})
    assert fit("--trainer.max_epochs=1") == 0
    run, names = run_of(fit), re.compile(r"validation/loss\s*│\s*([\d.]+)")
    # Neither the model nor its LoRA is said again.
    options = {"data": fit.options["data"], "trainer": fit.options["trainer"]}
    config = ["--config", fit.file("data.yaml", options)]
    capsys.readouterr()
    assert main(["validate", *config, "--adapter", str(run)]) == 0
    printed = capsys.readouterr().out
    assert f"Begins with the adapter '{run}/adapter' (step 4, the last)." in caplog.messages
    assert fit_loss(fit, "validate", capsys, f"--ckpt_path={fit.newest}") == names.findall(printed)

    predict = [
        "predict",
        *config,
        f"--data.predict={fit.options['data']['train']}",
        "--model.evaluation.max_new_tokens=2",
    ]
    assert main([*predict, f"--adapter={run / 'adapter'}"]) == 0

    still = ["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.0", "--trainer.max_epochs=1"]
    assert main(["fit", *config, "--adapter", str(run), *still]) == 0
    last = max(fit.folder.glob("run/**/adapter"), key=lambda path: int(path.parent.name.split("_")[1]))
    assert last.parent != run
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (run / "adapter", last))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    kinds = [json.loads((folder / "adapter_config.json").read_text()) for folder in (run / "adapter", last)]
    assert [(kind["r"], kind["lora_alpha"], kind["use_rslora"]) for kind in kinds] == [(3, 5, True)] * 2
    # A checkpoint of that fit stands alone.
    shutil.rmtree(run)
    assert main(["merge", "--adapter", str(fit.newest), "--output", str(fit.folder / "merged")]) == 0


def fit_loss(fit: Fit, command: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    capsys.readouterr()
    assert main([command, "--config", str(fit.folder / "run.yaml"), *arguments]) == 0
    return re.findall(r"validation/loss\s*│\s*([\d.]+)", capsys.readouterr().out)


@pytest.mark.parametrize("lora", [{}, {"init_lora_weights": "pissa"}, {"use_dora": True, "bias": "lora_only"}])
def test_a_module_begins_where_an_adapter_ended(tmp_path: Path, lora: dict[str, Any]) -> None:
    before = trained(saved_model(tmp_path / "base"), tmp_path, **lora)
    # What is not the default is the caller's own.
    module = NALoRALightningModule(
        str(tmp_path / "base"), LoRAOptions(dropout=0.25), adapter=AdapterOptions(start=str(tmp_path))
    )
    module.configure_model()
    assert (module.lora.r, module.lora.alpha, module.lora.dropout) == (2, 4, 0.25)
    state, expected = module.model.state_dict(), before.model.state_dict()  # type: ignore[union-attr]
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.equal(expected[name]), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.lora.r=4"], "it has r=2, and here it is 4"),
        (["--model.lora.alpha=7"], "it has lora_alpha=4, and here it is 7"),
        (["--model.lora.target_modules=[q_proj]"], "is in one and not in the other"),
        (["--model.lora.init_lora_weights=pissa"], "init_lora_weights=True, which changes the base model"),
    ],
)
def test_lora_that_an_adapter_does_not_fit_is_refused(fit: Fit, arguments: list[str], message: str) -> None:
    trained(saved_model(fit.folder / "base"), fit.folder)
    del fit.options["model"]["lora"]
    error = fit.error("--adapter", str(fit.folder), *arguments)
    assert message in error
    assert "leave the options of model.lora out" in error


def test_what_is_no_adapter_is_refused(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no adapter" in fit.error("--adapter", "elsewhere")
    assert "needs the folder" in fit.error("--adapter")
    assert "give the folder of an adapter or of a run" in fit.error("--adapter", fit.options["data"]["train"])
    trained(fit.options["model"]["model_name_or_path"], fit.folder)
    arguments = ["validate", "--config", fit.file("run.yaml", fit.options), "--adapter", str(fit.folder)]
    assert main([*arguments, "--ckpt_path=last"]) == 2
    assert "one model has one adapter" in capsys.readouterr().err


def test_adapters_of_other_kinds_are_refused_by_name(tmp_path: Path) -> None:
    get_peft_model(tiny_model("llama"), LoHaConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="of the kind LOHA, and here LoRA is trained"):
        lora_of_adapter(tmp_path, LoRAOptions())
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "alora_invocation_tokens": [3]}))
    with pytest.raises(ConfigurationError, match=r"has alora_invocation_tokens=\[3\], for which there is no option"):
        lora_of_adapter(tmp_path, LoRAOptions())
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        lora_of_adapter(tmp_path, LoRAOptions())
