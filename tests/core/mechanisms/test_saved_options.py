"""Options beside the state of a controller, as in a plain PyTorch loop."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from tiny_models import LLAMA_TARGETS, tiny_llama, with_lora

from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.saved_options import changed_options, in_words, saved_options
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions
from na_lora_lightning.core.observation.observer import ObserverOptions


def make_controller(max_tokens: int | None = 5, **options: Any) -> GateController:
    model = with_lora(tiny_llama(), LLAMA_TARGETS)
    controller = GateController(model, discover_gates(model).require(), ObserverOptions(max_tokens=max_tokens))
    controller.set_importance(ImportanceOptions(**options))
    controller.set_step_scale(StepScaleOptions())
    return controller


def test_a_controller_says_what_is_other_than_its_state(caplog: pytest.LogCaptureFixture) -> None:
    state = make_controller().state_dict()
    with caplog.at_level(logging.INFO, "na_lora_lightning"):
        assert make_controller().load_state_dict(state) == {}
        assert caplog.messages == []
        changes = make_controller(max_tokens=None, beta=0.5).load_state_dict(state)
    assert changes == {"max_tokens": (5, None), "importance.beta": (0.9, 0.5)}
    assert caplog.messages == [
        "NA-LoRA resumes with other options than its saved state has: max_tokens 5 → None, importance.beta 0.9 → 0.5."
    ]


def test_a_state_of_an_earlier_version_has_few_options_or_none() -> None:
    earlier = {"criterion": "homogeneity_gap", "signed": False, "steps": 3}
    assert saved_options(earlier, "criterion", "signed") == {"criterion": "homogeneity_gap", "signed": False}
    assert changed_options({}, ImportanceOptions()) == {}
    changes = changed_options(saved_options(earlier, "criterion", "signed"), ImportanceOptions())
    assert in_words(changes) == "criterion homogeneity_gap → output_derivative"
