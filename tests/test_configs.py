"""Every shipped configuration is complete, and trains a tiny model of the same class."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from module_helpers import saved_model, write_records

from na_lora_lightning.cli import main

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_configuration_trains_a_tiny_model(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    records = write_records(tmp_path / "records.jsonl")
    arguments = ["fit", "--config", str(config), "--model.model_name_or_path", saved_model(tmp_path / "base")]
    arguments += ["--data.train", records, "--data.validation", records]
    # The tiny tokenizer has no chat template to put a system prompt in.
    arguments += ["--data.system_prompt", "null", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    arguments += ["--trainer.max_steps", "3", "--trainer.log_every_n_steps", "1"]
    arguments += ["--gate_importance.warmup_steps", "1", "--trainer.enable_progress_bar", "false"]
    assert main(arguments) == 0
    (run,) = (tmp_path / "runs" / config.stem).glob("version_0")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["gate_importance"]["keep_fraction"] == 0.5
    assert saved["model"]["model_name_or_path"] == str(tmp_path / "base")
    assert list(run.glob("checkpoints/*.ckpt"))
    assert list((tmp_path / "runs").glob("**/adapter_model.safetensors"))
    assert "Adapter" in capsys.readouterr().out
