"""Every shipped configuration is complete, and trains a tiny model of the same class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from module_helpers import saved_model, write_records
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_data_helpers import private_dataset_cache  # noqa: F401
from vision_helpers import vlm_folders, write_vision_records  # noqa: F401

from na_lora_lightning.cli.main import main

pytestmark = [
    # The machine of the tests may have one processor.
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    # Lightning's estimate of sizes, which knows few precisions.
    pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary"),
]

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
# Of the model that a configuration for images names, the tiny one of the same class.
OF_IMAGES = {"smolvlm_256m": "idefics3", "qwen2_5_vl_3b": "qwen2_5_vl"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_the_configuration_trains_a_tiny_model(
    config: Path,
    vlm: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if kind := OF_IMAGES.get(config.stem):
        base, records = vlm(kind), write_vision_records(tmp_path, 8)
        # The tiny processor has sizes of its own.
        options = ["--data.image_options", "null", "--data.num_workers", "0", "--trainer.accumulate_grad_batches", "1"]
    else:
        base, records = saved_model(tmp_path / "base"), write_records(tmp_path / "records.jsonl")
        # The tiny tokenizer has no chat template to put a system prompt in.
        options = ["--data.system_prompt", "null"]
    arguments = ["fit", "--config", str(config), "--model.model_name_or_path", base, *options]
    arguments += ["--data.train", records, "--data.validation", records]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    arguments += ["--trainer.max_steps", "3", "--trainer.log_every_n_steps", "1"]
    arguments += ["--gate_importance.warmup_steps", "1", "--trainer.enable_progress_bar", "false"]
    assert main(arguments) == 0
    (run,) = (tmp_path / "runs" / config.stem).glob("version_0")
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["model_name_or_path"] == base
    # Gemma's is the plain reading of the method, and the others are the defaults.
    assert saved["gate_importance"]["keep_fraction"] == (0.5 if config.stem == "gemma3_270m" else 0.9)
    written = yaml.safe_load(config.read_text())
    written["gate_importance"]["warmup_steps"] = 1
    for mechanism in ("gate_importance", "step_scale"):
        assert written[mechanism].items() <= saved[mechanism].items()
    assert list(run.glob("checkpoints/*.ckpt"))
    assert list((tmp_path / "runs").glob("**/adapter_model.safetensors"))
    assert "Adapter" in capsys.readouterr().out
    if kind:
        # Curves of each part of the model.
        tags = EventAccumulator(str(run)).Reload().Tags()["scalars"]
        assert {"gate_step_scale/language_layer_01", "gate_step_scale/vision_layer_01"} <= set(tags)
