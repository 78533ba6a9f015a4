"""Arms that look back in time, and DoRA in some layers: what they do to steps, against sums written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.study import StudyError
from benchmarks.study.arms.arm import Arm
from benchmarks.study.arms.building import build
from benchmarks.study.arms.hooks import BuiltArm
from benchmarks.study.base_models import loading
from na_lora_lightning.core.lora_layers import is_lora_layer, lora_a, lora_b


def built_with(name: str, base: Any, **options: Any) -> Any:
    """An arm with a candidate's hook, on the tiny base model."""
    given = {"hook": f"benchmarks.study.temporal_candidates:{name}", "hook_options": options}
    model = loading.fresh_model(str(base), "float32", torch.device("cpu"))
    settings = {"steps": 4, "weight_decay": 0.0}
    return build(model, Arm.from_options("rule", given), {"rank": 2, "alpha": 4, "targets": "ffn"}, settings, 0.01, 0)


def adapters_of(built: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in built.model.named_parameters() if p.requires_grad}


def take_step(built: Any, step: int) -> tuple[dict[str, torch.Tensor], ...]:
    """Adapters before the step, after the optimizer's, after the rule's, and the gradients."""
    tokens = torch.randint(0, 60, (2, 8), generator=torch.Generator().manual_seed(step))
    built.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss.backward()
    before = adapters_of(built)
    built.hooks[0].before_step(step)
    built.optimizer.step()
    whole = adapters_of(built)
    built.hooks[0].after_step(step)
    gradients = {name: p.grad.clone() for name, p in built.model.named_parameters() if p.requires_grad}
    built.optimizer.zero_grad()
    return before, whole, adapters_of(built), gradients


def is_of(name: str, layers: str) -> bool:
    return layers == "all" or ("gate_proj" in name) == (layers == "gate")


@pytest.mark.parametrize("layers", ["gate", "others", "all"])
def test_rows_wait_where_their_step_climbs(base_model: Any, layers: str) -> None:
    built = built_with("CautiousRows", base_model, layers=layers)
    waiting = 0
    for step in range(5):
        before, whole, now, gradients = take_step(built, step)
        for name, plain in whole.items():
            moved = plain - before[name]
            if "lora_B" not in name or not is_of(name, layers):
                assert torch.equal(now[name], plain)
                continue
            descends = (moved * gradients[name]).sum(dim=1) < 0
            waiting += int((~descends).sum())
            assert torch.equal(now[name][~descends], before[name][~descends])
            if descends.any():
                own = now[name] - before[name]
                assert own.norm().item() == pytest.approx(moved.norm().item(), rel=1e-4)
                expected = moved[descends] * (moved.norm() / moved[descends].norm())
                torch.testing.assert_close(own[descends], expected, rtol=1e-3, atol=1e-7)
    assert waiting > 0


@pytest.mark.parametrize("layers", ["gate", "others", "all"])
def test_weights_go_back_a_part_of_the_way(base_model: Any, layers: str) -> None:
    built = built_with("Lookahead", base_model, layers=layers, every=2, share=0.25)
    start = adapters_of(built)
    _, whole, now, _ = take_step(built, 0)
    assert all(torch.equal(now[name], whole[name]) for name in now)
    _, whole, now, _ = take_step(built, 1)
    for name, plain in whole.items():
        expected = start[name] + 0.25 * (plain - start[name]) if is_of(name, layers) else plain
        torch.testing.assert_close(now[name], expected, rtol=1e-5, atol=1e-8)


def test_other_layers_are_refused(base_model: Any) -> None:
    with pytest.raises(StudyError, match="no layer is called 'router'"):
        built_with("Lookahead", base_model, layers="router")


TOKENS = torch.randint(0, 60, (2, 8), generator=torch.Generator().manual_seed(0))


def built_arm(base: Any, layers: str | None, **peft: Any) -> BuiltArm:
    """An arm after two steps."""
    options: dict[str, Any] = {"peft": peft}
    if layers is not None:
        options |= {"hook": "benchmarks.study.dora_layers:DoraIn", "hook_options": {"layers": layers}}
    built = build(
        loading.fresh_model(str(base), "float32", torch.device("cpu")),
        Arm.from_options("arm", options),
        {"rank": 2, "alpha": 4, "targets": "ffn"},
        {"steps": 4, "weight_decay": 0.0},
        0.01,
        0,
    )
    for _ in range(2):
        built.model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        built.optimizer.step()
        built.optimizer.zero_grad()
    return built


def adapted(built: BuiltArm) -> dict[str, Any]:
    """LoRA layers by name."""
    return {name: module for name, module in built.model.named_modules() if is_lora_layer(module)}


@pytest.mark.parametrize(
    ("layers", "kept"),
    [("gate", {"gate"}), ("up_proj", {"up"}), ("others", {"up", "down"}), ("all", {"gate", "up", "down"})],
)
def test_chosen_layers_compute_dora_and_the_others_lora(base_model: Any, layers: str, kept: set[str]) -> None:
    built = built_arm(base_model, layers, use_dora=True)
    for name, layer in adapted(built).items():
        inputs = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
        base = layer.get_base_layer().weight
        whole = base + layer.scaling["default"] * lora_b(layer, "default").weight @ lora_a(layer, "default").weight
        is_dora = name.rpartition(".")[2].removesuffix("_proj") in kept
        assert bool(layer.lora_magnitude_vector) == is_dora
        if is_dora:
            magnitude = layer.lora_magnitude_vector["default"].weight
            assert not torch.equal(magnitude, base.norm(dim=1))
            whole = whole * (magnitude / whole.norm(dim=1))[:, None]
        torch.testing.assert_close(layer(inputs), inputs @ whole.T, rtol=1e-4, atol=1e-6)


def test_dora_in_all_layers_is_the_dora_of_peft(base_model: Any) -> None:
    ours, plain = built_arm(base_model, "all", use_dora=True), built_arm(base_model, None, use_dora=True)
    for (name, own), (_, other) in zip(ours.model.named_parameters(), plain.model.named_parameters(), strict=True):
        assert torch.equal(own, other), name


def test_an_arm_without_dora_is_refused(base_model: Any) -> None:
    with pytest.raises(StudyError, match="use_dora: true"):
        built_arm(base_model, "gate")
