"""Arms of the tests of the study: one of each kind."""

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
