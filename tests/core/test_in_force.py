"""The line at the start of training, and the warnings where nothing of the method acts."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning_models import ForeignModule
from peft import PeftModel
from tiny_models import (
    GPT2_TARGETS,
    LLAMA_TARGETS,
    needs_stacked_experts,
    random_batch,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    with_lora,
)
from torch import Tensor

from na_lora_lightning import nonlinearity_aware
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.in_force import describe, say
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.errors import PlainLoRAWarning

GATES = "2 silu gates, 48 channels"
LEAST, NO_SCALE = "rows of the least responsive", "no step scale"


def line_of(controller: GateController) -> str:
    return describe(controller.gates, controller.mechanisms)


def controller_of(
    model: PeftModel, importance: ImportanceOptions | None, scale: StepScaleOptions | None = None, **allowed: bool
) -> GateController:
    controller = GateController(model, discover_gates(model).require(**allowed))
    if importance is not None:
        controller.set_importance(importance)
    if scale is not None:
        controller.set_step_scale(scale)
    return controller


def llama(activation: str = "silu") -> PeftModel:
    return with_lora(tiny_llama(activation=activation), LLAMA_TARGETS)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "na_lora_lightning"]


@pytest.mark.parametrize(
    ("importance", "scale", "expected"),
    [
        # 0.9 of 24 channels is 22, the nearest whole number.
        ({}, {}, "rows of the least responsive 10 % (4) held from step 11; step scale by activation, not normalised"),
        (
            {"keep_fraction": 0.5, "warmup_steps": 0},
            None,
            f"{LEAST} 50 % (24) held from step 1; {NO_SCALE}",
        ),
        ({"control": "random"}, None, "rows of a random 10 % (4) held from step 11; no step scale"),
        ({"control": "reversed"}, None, "rows of the most responsive 10 % (4) held from step 11; no step scale"),
        (
            {"scope": "global"},
            None,
            f"{LEAST} 10 % of all gates together (5) held from step 11; {NO_SCALE}",
        ),
        ({"selection": "soft"}, None, f"steps of rows weighted by responsiveness from step 11; {NO_SCALE}"),
        (
            {"selection": "soft", "keep_fraction": 1.0},
            None,
            f"steps of rows weighted by responsiveness from step 11; {NO_SCALE}",
        ),
        (
            {"selection": "threshold"},
            None,
            f"rows below 0.5 times the mean of responsiveness held from step 11; {NO_SCALE}",
        ),
        (
            {"mask_gradient_to_a": True, "keep_fraction": 0.75},
            None,
            "rows of the least responsive 25 % (12) held from step 11, the gradient of A masked too; no step scale",
        ),
        # From 1: the first mask after the warm-up that holds a row is the second.
        (
            {"keep_fraction": 0.5, "keep_fraction_start": 1.0, "keep_fraction_steps": 100},
            None,
            "rows of the least responsive 0 % (moving to 50 % by step 111) held from step 21; no step scale",
        ),
        ({"keep_fraction": 1.0}, None, "no row held (keep_fraction 1); no step scale; plain LoRA, watched"),
        (
            {"keep_fraction": 1.0},
            {"eta_min": 1.0},
            "no row held (keep_fraction 1); step scale exactly 1 (eta_min 1); plain LoRA, watched",
        ),
        (
            {"keep_fraction": 0.99},
            {},
            "no row held (keep_fraction 0.99 rounds to all channels); step scale by activation, not normalised",
        ),
        (None, {"granularity": "site", "normalize": False}, "no mask; step scale by site, not normalised"),
        (None, {"matrix_a_factor": 0.25}, "no mask; step scale by activation, not normalised, steps of A times 0.25"),
    ],
)
def test_the_line_says_what_is_held_and_scaled_and_from_which_step(
    importance: dict[str, Any] | None, scale: dict[str, Any] | None, expected: str
) -> None:
    mask = None if importance is None else ImportanceOptions(**importance)
    controller = controller_of(llama(), mask, None if scale is None else StepScaleOptions(**scale))
    assert line_of(controller) == f"NA-LoRA: {GATES}; {expected}."


def test_activations_without_a_partition_are_named() -> None:
    scale = StepScaleOptions(matrix_a_factor=0.5)
    line = line_of(controller_of(llama("relu"), None, scale))
    assert line == "NA-LoRA: 2 relu gates, 48 channels; no mask; step scale exactly 1, steps of A times 0.5."


def test_gates_without_lora_are_counted() -> None:
    model = with_lora(tiny_llama(), r"model\.layers\.1\.mlp\.(gate|up)_proj")
    line = line_of(controller_of(model, ImportanceOptions(), allow_unmasked_gates=True))
    assert line.startswith("NA-LoRA: 1 silu gate, 24 channels (1 gate without LoRA left out); rows of")


@needs_stacked_experts
def test_experts_are_counted() -> None:
    model = with_lora(tiny_mixtral(), [], target_parameters=["experts.gate_up_proj"])
    assert line_of(controller_of(model, ImportanceOptions())).startswith(
        "NA-LoRA: 2 silu gates of 4 experts, 192 channels; rows of the least responsive 10 % (16) held"
    )


def test_parts_of_a_multimodal_model_are_told_apart() -> None:
    module = ForeignModule("llava")
    controller = GateController(module.model, discover_gates(module.model, module.example_inputs).require())
    controller.set_importance(ImportanceOptions())
    assert line_of(controller).startswith(
        "NA-LoRA: 2 quick_gelu gates in vision, 1 gelu gate in projector, 2 silu gates in language, 112 channels; rows"
    )


def train(model: PeftModel, steps: int, a_pass: Callable[[int], Tensor] | None = None, **options: Any) -> list[str]:
    """A plain loop, whose passes give a loss; the sentences of its warnings."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with nonlinearity_aware(model, optimizer, **options):
            for step in range(steps):
                loss = model(**random_batch(step)).loss if a_pass is None else a_pass(step)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    assert all(entry.category is PlainLoRAWarning for entry in caught)
    return [str(entry.message) for entry in caught]


MASK = ImportanceOptions(keep_fraction=0.5, warmup_steps=3)


def test_the_line_comes_once_with_the_first_forward_pass(caplog: pytest.LogCaptureFixture) -> None:
    assert train(llama(), 5, importance=MASK, step_scale=None) == []
    line = f"NA-LoRA: {GATES}; rows of the least responsive 50 % (24) held from step 4; no step scale."
    assert told(caplog) == [line]
    caplog.clear()
    model = llama()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with nonlinearity_aware(model, optimizer, importance=MASK, step_scale=None) as controller:
        state = controller.state_dict()
        state["steps"] = state["importance"]["steps"] = 7
        controller.load_state_dict(state)
        assert told(caplog) == []
        model(**random_batch(0)).loss.backward()
    assert told(caplog) == [f"{line[:-1].replace('from step 4', 'since step 4')}; resuming at step 8."]


def test_a_logger_silences_the_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "na_lora_lightning"):
        train(llama(), 4, importance=MASK, step_scale=None)
    assert told(caplog) == []


def test_the_line_is_seen_where_nobody_has_set_up_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    say("once")
    assert sys.stderr.getvalue() == "once\n"  # type: ignore[attr-defined]
    assert logging.getLogger("na_lora_lightning").handlers == []


def test_a_training_within_the_warmup_is_plain_lora_and_says_so() -> None:
    planned = train(llama(), 3, importance=MASK, step_scale=None, total_steps=3)
    assert planned == [
        "training is planned to end at optimizer step 3 and the mask holds no row before step 4 (warm-up of 3), so "
        "this is plain LoRA; lower warmup_steps or train longer."
    ]
    unplanned = train(llama(), 3, importance=MASK, step_scale=None)
    assert unplanned == [
        "training ended at optimizer step 3 and no row had been held by then (warm-up of 3), so this was plain LoRA; "
        "lower warmup_steps or train longer."
    ]
    assert train(llama(), 4, importance=MASK, step_scale=None, total_steps=4) == []


def test_the_schedule_of_the_keep_fraction_counts_as_well() -> None:
    slow = ImportanceOptions(
        keep_fraction=0.5, keep_fraction_start=1.0, keep_fraction_steps=100, warmup_steps=1, refresh_every=4
    )
    # Step 2 keeps all; step 6 keeps 0.98 of 24 channels, which rounds to all; step 10 keeps 0.96, which is 23.
    assert slow.first_mask([24]) == 10
    (sentence,) = train(llama(), 3, importance=slow, step_scale=None, total_steps=9)
    assert "at optimizer step 9 and the mask holds no row before step 10 (warm-up of 1 and the schedule" in sentence


def test_a_keep_fraction_that_rounds_to_all_rows_is_told_before_training() -> None:
    rounded = ImportanceOptions(keep_fraction=0.99, warmup_steps=0)
    (sentence,) = train(llama(), 2, importance=rounded, step_scale=None)
    assert sentence == (
        "keep_fraction 0.99 of 24 gate channels rounds to all of them, so no row is ever held and this is plain LoRA; "
        "lower keep_fraction, rank over all gates (scope='global'), or set keep_fraction to 1 to watch only."
    )
    assert train(llama(), 2, importance=ImportanceOptions(0.98, warmup_steps=0, scope="global"), step_scale=None) == []


def test_watching_is_no_reason_to_warn() -> None:
    assert train(llama(), 2, importance=ImportanceOptions(keep_fraction=1.0), step_scale=None, total_steps=2) == []


def test_a_threshold_that_nothing_falls_below_is_told_at_the_end() -> None:
    low = ImportanceOptions(selection="threshold", threshold=1e-6, warmup_steps=0)
    (sentence,) = train(llama(), 2, importance=low, step_scale=None)
    assert sentence == (
        "no row was held in 2 optimizer steps, because no mask left one out, so this was plain LoRA; keep fewer rows."
    )


def test_a_step_scale_without_a_meaningful_partition_is_told_at_the_end() -> None:
    model = llama()
    with torch.no_grad():
        # Pre-activations close to zero are homogeneous all of them.
        for site in discover_gates(model):
            for parameter in site.lora_layer.parameters():
                parameter.mul_(1e-3)
    (sentence,) = train(model, 2, importance=None, step_scale=StepScaleOptions())
    assert sentence == (
        "the step scale was exactly 1 in all of 2 optimizer steps, because at no gate two regimes held 5 % of the "
        "activation mass, so it changed nothing; leave it out, or lower its tau."
    )


def test_a_normalised_scale_of_one_gate_is_told_before_training() -> None:
    model = with_lora(tiny_llama(layers=1), LLAMA_TARGETS)
    sentences = train(model, 1, importance=None, step_scale=StepScaleOptions(granularity="site", normalize=True))
    assert sentences[0].startswith("normalize with granularity 'site' makes the step scale exactly 1")


def test_experts_without_tokens_are_told_at_the_end() -> None:
    model = with_lora(tiny_mixtral(), [], target_parameters=["experts.gate_up_proj"])
    one_token = torch.tensor([[5]])
    mask = ImportanceOptions(keep_fraction=0.5, warmup_steps=0)
    (sentence,) = train(model, 1, lambda _: model(one_token).logits.sum(), importance=mask, step_scale=None)
    assert sentence == (
        "2 of 4 experts of model.layers.0.mlp.experts.act_fn, 2 of 4 experts of model.layers.1.mlp.experts.act_fn saw "
        "no token in this training, so their rows were neither held nor scaled; train longer, look at more tokens "
        "(observer.max_tokens), or take them out of the LoRA targets."
    )


def test_a_silent_site_that_was_allowed_is_told_at_the_end() -> None:
    model = with_lora(tiny_gpt2(), GPT2_TARGETS)
    skipped: Any = model.get_base_model().transformer.h[1].mlp

    def a_pass(step: int) -> Tensor:
        skipped.forward = lambda hidden: hidden
        return model(**random_batch(step)).loss

    mask, allowed = ImportanceOptions(keep_fraction=0.5, warmup_steps=0), ObserverOptions(allow_silent_sites=True)
    (sentence,) = train(model, 2, a_pass, importance=mask, step_scale=None, observer=allowed)
    assert sentence.startswith("transformer.h.1.mlp.act saw no token in this training, so their rows were neither held")


def test_rows_without_gradients_are_told_at_the_end() -> None:
    model = llama()

    def a_pass(step: int) -> Tensor:
        model(**random_batch(step))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return torch.zeros((), requires_grad=True)

    (sentence,) = train(model, 1, a_pass, importance=MASK, step_scale=None)
    assert sentence.startswith("no LoRA row of the gates got a gradient in this training, so none was trained")
