"""The callback under TRL's trainers, which are not among the tests' requirements: ``pip install trl accelerate``."""

from __future__ import annotations

import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from module_helpers import saved_model
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from na_lora_lightning import NALoRATrainerCallback

pytestmark = [
    pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed"),
    # Of TRL and of the models that it is given.
    pytest.mark.filterwarnings("ignore"),
]
EXAMPLE = Path(__file__).parents[1] / "examples" / "trl_trainers.py"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_example_learns_by_sft_and_then_by_preferences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["trl_trainers.py", saved_model(tmp_path / "model")])
    names = runpy.run_path(str(EXAMPLE))
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 50
    for kind in ("sft", "dpo"):
        logs = [entry for entry in names[kind].state.log_history if "loss" in entry]
        losses = [entry["loss"] for entry in logs]
        assert len(losses) == 4
        assert losses[-1] < losses[0]
        # The first mask holds 2 of 24 channels in each of two layers.
        churn = [entry["gates/mask_churn"] for entry in logs]
        assert churn[:2] == pytest.approx([0.0, 2 / 24], abs=1e-4)
        assert (tmp_path / "runs" / f"trl_{kind}" / "checkpoint-20" / "adapter_model.safetensors").is_file()
    rewards = [entry["rewards/accuracies"] for entry in names["dpo"].state.log_history if "rewards/accuracies" in entry]
    assert rewards[-1] > 0.5


def adapter(trainer: str, model: str, folder: Path, *callbacks: Any) -> dict[str, torch.Tensor]:
    """What ten steps of a trainer leave."""
    import trl
    from datasets import Dataset

    answers = {"completion": "2"} if trainer == "SFT" else {"chosen": "2", "rejected": "3"}
    torch.manual_seed(0)
    getattr(trl, f"{trainer}Trainer")(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=getattr(trl, f"{trainer}Config")(
            str(folder), max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, bf16=False, report_to="none"
        ),
        train_dataset=Dataset.from_list([{"prompt": "1+", **answers}] * 4),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=list(callbacks),
    ).train()
    return load_file(folder / "checkpoint-6" / "adapter_model.safetensors")


@pytest.mark.parametrize("trainer", ["SFT", "DPO"])
def test_all_rows_kept_is_bitwise_plain_lora_and_a_mask_is_not(tmp_path: Path, trainer: str) -> None:
    model = saved_model(tmp_path / "model")
    plain = adapter(trainer, model, tmp_path / "plain")
    kept = adapter(trainer, model, tmp_path / "kept", NALoRATrainerCallback({"keep_fraction": 1.0}, step_scale=None))
    halved = {"keep_fraction": 0.5, "warmup_steps": 0}
    masked = adapter(trainer, model, tmp_path / "masked", NALoRATrainerCallback(halved, step_scale=None))
    assert plain.keys() == kept.keys() == masked.keys()
    assert all(plain[name].equal(kept[name]) for name in plain)
    # From the second step on half of the rows are held.
    (name,) = [name for name in plain if "layers.0.mlp.gate_proj.lora_B" in name]
    assert not plain[name].equal(masked[name])
