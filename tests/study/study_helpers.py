"""What tests of the study share: arms, one of each kind, and results made up."""

from __future__ import annotations

from typing import Any

ARMS: dict[str, Any] = {
    "lora": {},
    "mask": {"importance": {"warmup_steps": 1, "refresh_every": 1}},
    "keep_all": {"importance": {"keep_fraction": 1.0, "warmup_steps": 0}},
    "random": {"importance": {"control": "random", "warmup_steps": 0}},
    "equal_norm": {"importance": {"warmup_steps": 0}, "hook": "equal_norm"},
    "scale": {"step_scale": {"granularity": "channel", "normalize": True}},
    "no_gates": {"without_gates": True},
    "no_warmup": {"training": {"warmup_fraction": 0.0}},
    "rslora": {"peft": {"use_rslora": True}},
    "dora": {"peft": {"use_dora": True}},
    "pissa": {"peft": {"init_lora_weights": "pissa"}, "rate_factor": 0.5},
    "lora_plus": {"optimizer": "lora_plus"},
    "adalora": {"method": "adalora"},
    "lora_fa": {"optimizer": "lora_fa"},
}


def result(
    arm: str, rate: float, seed: int, valid: float | None, test: float, setting: str = "s", seconds: float = 1.0
) -> dict[str, Any]:
    """A result with what reports read; forgetting is 0.25 at the first and 0.5 at the last interval."""

    def entry(step: int, valid_loss: float | None, test_loss: float, held_out: float) -> dict[str, Any]:
        return {
            "step": step,
            "valid loss": valid_loss,
            "test loss": test_loss,
            "test accuracy": 0.5,
            "held-out loss": held_out,
        }

    metrics = [entry(0, 9.0, 9.0, 2.0), entry(5, 0.5, 0.75, 2.25), entry(10, valid, test, 2.5)]
    return {
        "run_info": {"train_config": {"setting": setting, "arm_name": arm, "rate": rate, "seed": seed}},
        "train_info": {
            "status": "success" if valid is not None else "diverged",
            "metrics": metrics,
            "train_time": seconds,
            "accelerator_memory_max": 2**20,
            "num_trainable_params": 7,
        },
        "study_info": {
            "fingerprint": "f",
            "probes": [{"step": step, "misalignment": [step / 100, None]} for step in (0, 5, 10)],
        },
    }
