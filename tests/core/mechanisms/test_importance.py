"""Options, moving averages, masks and weights of the temporal-importance mechanism, and options saved beside them."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import LLAMA_TARGETS, PLAIN_IMPORTANCE, tiny_llama, with_lora

from na_lora_lightning.core.channels import Layout
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.mechanisms.importance import TemporalImportance, row_weights, top_k_mask
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions, kept_count
from na_lora_lightning.core.mechanisms.mechanism import moving_average
from na_lora_lightning.core.mechanisms.saved_options import changed_options, in_words, saved_options
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions
from na_lora_lightning.core.observation.observer import ObserverOptions, StepStatistics
from na_lora_lightning.errors import ConfigurationError

CPU = torch.device("cpu")
SCORES = st.lists(st.floats(0.0, 1.0, width=32), min_size=1, max_size=50)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_fraction": 0.0}, "keep_fraction is 0.0.*above 0 and at most 1"),
        ({"keep_fraction": 2.0}, "keep_fraction is 2.0"),
        ({"keep_fraction": float("nan")}, "keep_fraction is nan"),
        ({"keep_fraction_start": 1.5, "keep_fraction_steps": 3}, "keep_fraction_start is 1.5"),
        ({"keep_fraction_start": 0.9}, "keep_fraction_steps is 0"),
        ({"beta": 1.0}, "beta is 1.0"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"warmup_steps": -1}, "warmup_steps is -1.*at least 0"),
        ({"refresh_every": 0}, "refresh_every is 0.*at least 1"),
        ({"criterion": "gradient"}, "criterion is 'gradient'.*selection_derivative"),
        ({"scope": "layer"}, "scope is 'layer'"),
        ({"selection": "hard"}, "selection is 'hard'"),
        ({"control": "shuffled"}, "control is 'shuffled'"),
    ],
)
def test_bad_options_are_refused_with_the_remedy(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ImportanceOptions(**options)  # type: ignore[arg-type]


@given(history=st.lists(st.floats(0, 10), min_size=1, max_size=30), beta=st.floats(0, 0.99))
def test_moving_average_is_bias_corrected(history: list[float], beta: float) -> None:
    average, weight = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    valid = torch.ones(1, dtype=torch.bool)
    for value in history:
        average = moving_average(average, torch.tensor([value], dtype=torch.float64), valid, beta)
        weight = moving_average(weight, torch.ones(1, dtype=torch.float64), valid, beta)
    assert (average / weight).item() == pytest.approx(reference.corrected_average(history, beta), rel=1e-9, abs=1e-9)


@given(scores=SCORES, keep_fraction=st.floats(0.01, 1.0))
def test_top_k_equals_the_reference_ties_included(scores: list[float], keep_fraction: float) -> None:
    found = top_k_mask(torch.tensor(scores), kept_count(keep_fraction, len(scores)))
    assert found.tolist() == reference.top_k(scores, keep_fraction)


@given(scores=SCORES, keep_fraction=st.floats(0.01, 1.0), seed=st.integers(0, 1000))
def test_controls_keep_as_many_channels(scores: list[float], keep_fraction: float, seed: int) -> None:
    values = torch.tensor(scores)
    count = kept_count(keep_fraction, len(scores))
    for control in ("random", "reversed"):
        options = ImportanceOptions(control=control)  # type: ignore[arg-type]
        assert int(row_weights(values, options, keep_fraction, seed).sum()) == count
    same = [row_weights(values, ImportanceOptions(control="random"), keep_fraction, seed) for _ in range(2)]
    assert torch.equal(*same)


def test_reversed_control_keeps_the_least_important() -> None:
    scores = torch.tensor([0.3, 0.1, 0.4, 0.2])
    assert row_weights(scores, ImportanceOptions(), 0.5, 0).tolist() == [1, 0, 1, 0]
    assert row_weights(scores, ImportanceOptions(control="reversed"), 0.5, 0).tolist() == [0, 1, 0, 1]


def test_threshold_and_soft_weights() -> None:
    scores = torch.tensor([0.1, 0.2, 0.3, 0.6])
    kept = row_weights(scores, ImportanceOptions(selection="threshold", threshold=0.5), 0.5, 0)
    assert kept.tolist() == [0, 1, 1, 1]
    soft = row_weights(scores, ImportanceOptions(selection="soft"), 0.5, 0)
    assert torch.allclose(soft, scores / 0.3)
    assert soft.mean().item() == pytest.approx(1.0, abs=1e-6)
    reversed_soft = row_weights(scores, ImportanceOptions(selection="soft", control="reversed"), 0.5, 0)
    assert reversed_soft.mean().item() == pytest.approx(1.0, abs=1e-6)
    assert reversed_soft.argsort().tolist() == [3, 2, 1, 0]
    assert row_weights(torch.zeros(3), ImportanceOptions(selection="soft"), 0.5, 0).tolist() == [1, 1, 1]


def test_keep_fraction_schedule_is_a_straight_line_after_the_warm_up() -> None:
    options = ImportanceOptions(keep_fraction=0.2, keep_fraction_start=1.0, keep_fraction_steps=4, warmup_steps=3)
    found = [options.keep_fraction_at(step) for step in range(1, 11)]
    assert found == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])


def test_masks_come_after_the_warm_up_and_at_each_refresh() -> None:
    options = ImportanceOptions(warmup_steps=3, refresh_every=2)
    assert [step for step in range(1, 11) if options.refreshes_at(step)] == [4, 6, 8, 10]


def statistics(*rows: list[float], tokens: float = 1.0) -> StepStatistics:
    return StepStatistics(torch.tensor(rows), torch.full((2,), tokens))


def test_scope_site_ranks_each_site_and_global_ranks_all() -> None:
    layout = Layout([(1, 2), (1, 2)], CPU)
    for scope, expected in (("site", [1, 0, 0, 1]), ("global", [0, 0, 1, 1])):
        options = ImportanceOptions(keep_fraction=0.5, scope=scope, warmup_steps=0)  # type: ignore[arg-type]
        importance = TemporalImportance(options, layout)
        importance.update(statistics([0.2, 0.1, 0.3, 0.4]))
        assert importance.weights.tolist() == expected
        assert importance.changed.sum() == 2


def test_a_site_without_tokens_keeps_its_state() -> None:
    options = ImportanceOptions(keep_fraction=0.5, warmup_steps=0)
    importance = TemporalImportance(options, Layout([(1, 2), (1, 2)], CPU))
    importance.update(StepStatistics(torch.tensor([[0.2, 0.1, 0.0, 0.0]]), torch.tensor([1.0, 0.0])))
    assert importance.importance.tolist() == pytest.approx([0.2, 0.1, 0.0, 0.0])
    assert importance.weights.tolist() == [1, 0, 1, 1]


def test_change_criterion_averages_differences() -> None:
    options = ImportanceOptions(criterion="output_derivative_change", beta=0.5, warmup_steps=9)
    importance = TemporalImportance(options, Layout([(1, 1), (1, 1)], CPU))
    for value in (1.0, 3.0, 2.0):
        importance.update(statistics([value, value]))
    assert importance.importance[0].item() == pytest.approx(reference.corrected_average([2.0, 1.0], 0.5))


def test_state_restores_exactly_and_another_layout_is_refused() -> None:
    options = ImportanceOptions(**PLAIN_IMPORTANCE, warmup_steps=0, refresh_every=2, control="random")
    first, second = (TemporalImportance(options, Layout([(1, 3), (1, 2)], CPU)) for _ in range(2))
    steps = [statistics(torch.rand(5).tolist()) for _ in range(6)]
    for step in steps[:3]:
        first.update(step)
    second.load_state_dict(first.state_dict())
    for step in steps[3:]:
        first.update(step)
        second.update(step)
    assert torch.equal(first.weights, second.weights)
    assert torch.equal(first.importance, second.importance)
    with pytest.raises(ConfigurationError, match="holds the importance of 5 gate channels and the model has 6"):
        TemporalImportance(options, Layout([(1, 3), (1, 3)], CPU)).load_state_dict(first.state_dict())
    other = replace(options, criterion="output_derivative")
    with pytest.raises(
        ConfigurationError, match="criterion='selection_derivative' and this run has 'output_derivative'"
    ):
        TemporalImportance(other, Layout([(1, 3), (1, 2)], CPU)).load_state_dict(first.state_dict())


def test_a_criterion_that_cannot_rank_is_refused() -> None:
    gates = discover_gates(with_lora(tiny_llama(activation="relu"), LLAMA_TARGETS))
    for criterion in ("selection_derivative", "homogeneity_gap"):
        with pytest.raises(ConfigurationError, match=r"cannot rank the channels of .*use criterion='output_deriv"):
            ImportanceOptions(criterion=criterion).check_activations(gates.sites)  # type: ignore[arg-type]
    ImportanceOptions(criterion="output_derivative").check_activations(gates.sites)


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
