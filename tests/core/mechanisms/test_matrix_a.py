"""The factor on the step of A: what moves, what does not, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_models import LLAMA_TARGETS, needs_stacked_experts, random_batch, tiny_llama, tiny_mixtral, with_lora
from torch import Tensor

from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions
from na_lora_lightning.errors import ConfigurationError, UpdateError


def trained(model: PeftModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def with_factor(model: PeftModel, factor: float) -> tuple[GateController, set[str]]:
    """A controller that does nothing but shorten the step of A, and the names of these matrices."""
    gates = discover_gates(model).require()
    controller = GateController(model, gates)
    controller.set_step_scale(StepScaleOptions(eta_min=1.0, matrix_a_factor=factor))
    matrices = {id(entry.parameter) for site in gates for entry in site.matrices_a()}
    return controller, {name for name, value in model.named_parameters() if id(value) in matrices}


def take_steps(model: PeftModel, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(**random_batch(step)).loss.backward()
        optimizer.step()


def test_frozen_a_does_not_move_under_momentum_and_weight_decay(make_peft_model: Callable[..., PeftModel]) -> None:
    model = make_peft_model()
    controller, matrices = with_factor(model, 0.0)
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=1e-2, weight_decay=0.5)
    controller.attach([optimizer])
    before = trained(model)
    take_steps(model, optimizer, 4)
    assert matrices
    for name, value in trained(model).items():
        assert torch.equal(value, before[name]) == (name in matrices), name


@needs_stacked_experts
def test_a_of_stacked_experts_takes_a_part_of_its_step() -> None:
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    plain, slow = (with_lora(tiny_mixtral(), [], target_parameters=targets) for _ in range(2))
    controller, matrices = with_factor(slow, 0.25)
    optimizers = [torch.optim.SGD(trained_parameters(model), lr=1.0, weight_decay=0.1) for model in (plain, slow)]
    controller.attach([optimizers[1]])
    before = trained(plain)
    for model, optimizer in zip((plain, slow), optimizers, strict=True):
        take_steps(model, optimizer, 1)
    whole = trained(plain)
    # A layer's experts share one matrix of all their rows, which the gates and ups of an expert share.
    assert len(matrices) == sum("lora_A" in name for name in before) // 2
    for name, value in trained(slow).items():
        expected = torch.lerp(before[name], whole[name], 0.25) if name in matrices else whole[name]
        assert torch.equal(value, expected), name


def trained_parameters(model: PeftModel) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_a_takes_a_part_of_its_step_and_nothing_else_changes(make_peft_model: Callable[..., PeftModel]) -> None:
    plain, slow = make_peft_model(), make_peft_model()
    controller, matrices = with_factor(slow, 0.25)
    optimizers = [torch.optim.AdamW(trained_parameters(model), lr=1e-2, weight_decay=0.1) for model in (plain, slow)]
    controller.attach([optimizers[1]])
    before = trained(plain)
    for model, optimizer in zip((plain, slow), optimizers, strict=True):
        take_steps(model, optimizer, 1)
    whole = trained(plain)
    for name, value in trained(slow).items():
        if name in matrices:
            torch.testing.assert_close(value - before[name], 0.25 * (whole[name] - before[name]), rtol=1e-4, atol=1e-7)
        else:
            assert torch.equal(value, whole[name]), name


def test_a_rate_of_its_own_does_the_same(make_peft_model: Callable[..., PeftModel]) -> None:
    grouped, slow = make_peft_model(), make_peft_model()
    controller, matrices = with_factor(slow, 0.25)
    slow_optimizer = torch.optim.AdamW(trained_parameters(slow), lr=1e-2, weight_decay=0.0)
    controller.attach([slow_optimizer])
    by_name = dict(grouped.named_parameters())
    fast = [value for name, value in by_name.items() if value.requires_grad and name not in matrices]
    groups = [{"params": fast}, {"params": [by_name[name] for name in sorted(matrices)], "lr": 2.5e-3}]
    take_steps(grouped, torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0), 6)
    take_steps(slow, slow_optimizer, 6)
    expected = trained(grouped)
    for name, value in trained(slow).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)


def freeze_a(model: PeftModel) -> PeftModel:
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


def test_where_no_a_is_trained_the_factor_changes_nothing(make_peft_model: Callable[..., PeftModel]) -> None:
    found = []
    for factor in (0.5, 1.0):
        model = freeze_a(make_peft_model())
        controller = GateController(model, discover_gates(model).require())
        controller.set_step_scale(StepScaleOptions(matrix_a_factor=factor))
        optimizer = torch.optim.AdamW(trained_parameters(model), lr=1e-2, weight_decay=0.1)
        controller.attach([optimizer])
        before = trained(model)
        take_steps(model, optimizer, 4)
        assert before
        assert all("lora_A" not in name and not torch.equal(v, before[name]) for name, v in trained(model).items())
        # Else a scale that is not in force would pass as well.
        assert controller.weights.std() > 0
        found.append((trained(model), controller.weights))
    assert torch.equal(found[0][1], found[1][1])
    for name, value in found[0][0].items():
        assert torch.equal(value, found[1][0][name]), name


def relu_llama() -> PeftModel:
    return with_lora(tiny_llama(activation="relu"), LLAMA_TARGETS)


def test_of_activations_without_a_partition_the_step_of_a_alone_is_shortened() -> None:
    plain, slow = relu_llama(), relu_llama()
    gates = discover_gates(slow).require()
    matrices = {id(entry.parameter) for site in gates for entry in site.matrices_a()}
    controller = GateController(slow, gates)
    controller.set_step_scale(StepScaleOptions(matrix_a_factor=0.5))
    optimizers = [torch.optim.AdamW(trained_parameters(model), lr=1e-2, weight_decay=0.1) for model in (plain, slow)]
    controller.attach([optimizers[1]])
    before = trained(plain)
    for model, optimizer in zip((plain, slow), optimizers, strict=True):
        take_steps(model, optimizer, 1)
    assert bool((controller.weights == 1.0).all())
    assert len(matrices) == 2
    whole = trained(plain)
    for name, parameter in slow.named_parameters():
        if parameter.requires_grad:
            expected = torch.lerp(before[name], whole[name], 0.5) if id(parameter) in matrices else whole[name]
            assert torch.equal(parameter, expected), name


def test_where_neither_b_nor_a_would_move_otherwise_the_scale_is_refused() -> None:
    model = freeze_a(relu_llama())
    controller = GateController(model, discover_gates(model).require())
    with pytest.raises(ConfigurationError, match="the step scale is exactly 1 for relu"):
        controller.set_step_scale(StepScaleOptions(matrix_a_factor=0.5))


def test_a_that_no_optimizer_holds_is_refused(make_peft_model: Callable[..., PeftModel]) -> None:
    model = make_peft_model()
    controller, matrices = with_factor(model, 0.5)
    held = [value for name, value in model.named_parameters() if value.requires_grad and name not in matrices]
    with pytest.raises(UpdateError, match=r"no optimizer holds .*lora_A\.default"):
        controller.attach([torch.optim.AdamW(held, lr=1e-2)])


def test_it_is_no_plain_lora_where_the_scale_is_one(make_peft_model: Callable[..., PeftModel]) -> None:
    model = make_peft_model()
    controller = GateController(model, discover_gates(model).require())
    options: dict[str, Any] = {"granularity": "activation", "normalize": True}
    if len({site.activation.name for site in controller.gates.sites}) == 1:
        with pytest.raises(ConfigurationError, match="the only activation"):
            controller.set_step_scale(StepScaleOptions(**options, matrix_a_factor=1.0))
    controller.set_step_scale(StepScaleOptions(**options, matrix_a_factor=0.25))
