"""Hooks and candidate rules: what they do to steps, against sums written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml

from benchmarks.study import StudyError
from benchmarks.study.arms.building import build, hook_class
from benchmarks.study.arms.candidates import RowRule
from benchmarks.study.arms.hooks import BuiltArm
from benchmarks.study.cells import Arm
from benchmarks.study.report.evidence import SPECIFICATION
from benchmarks.study.run.models import fresh_model
from na_lora_lightning.core.lora_layers import is_lora_layer, lora_a, lora_b

MEASURE = {"keep_fraction": 1.0, "warmup_steps": 0}
LAYERS = ["gate", "up", "down"]


def built_on(base: Any, arm: Arm) -> BuiltArm:
    """An arm on the tiny base model."""
    lora = {"rank": 2, "alpha": 4, "targets": "ffn"}
    return build(fresh_model(str(base)), arm, lora, {"steps": 4, "weight_decay": 0.0}, 0.01, 0)


def rule(name: str, base: Any, **options: Any) -> Any:
    """An arm with a candidate's hook, on the tiny base model."""
    given = {"hook": f"benchmarks.study.candidates:{name}", "hook_options": options}
    if name in ("ResponsivePower", "SelectionTrustRegion", "TrustRegionAndSlowA"):
        given["importance"] = MEASURE
    elif name in ("MaskOfUpLayer", "ActivityWeighted"):
        given["importance"] = {"warmup_steps": 0, "refresh_every": 1}
    arm = Arm.from_options("candidate", given)
    return built_on(base, arm)


def take_step(built: Any, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Values of the rule's targets before and after a step, channels first."""
    hook: RowRule = built.hooks[0]
    tokens = torch.randint(0, 60, (2, 8), generator=torch.Generator().manual_seed(seed))
    built.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss.backward()
    before = [target.by_channel(target.parameter.detach().clone()) for target in hook.targets]
    hook.before_step(0)
    built.optimizer.step()
    whole = [target.by_channel(target.parameter.detach().clone()) for target in hook.targets]
    hook.after_step(0)
    built.optimizer.zero_grad()
    now = [target.by_channel(target.parameter.detach()) for target in hook.targets]
    return [b - a for a, b in zip(before, whole, strict=True)], [b - a for a, b in zip(before, now, strict=True)]


@pytest.mark.parametrize("power", [0.5, 1.0, -0.5])
def test_rows_are_weighed_by_their_gradients_at_the_norm_of_the_step(base_model: Any, power: float) -> None:
    built = rule("GradientSignal", base_model, power=power, layers=LAYERS)
    take_step(built, 0)
    whole, weighed = take_step(built, 1)
    assert len(whole) == 6
    for target, plain, own in zip(built.hooks[0].targets, whole, weighed, strict=True):
        second = target.by_channel(built.optimizer.state[target.parameter]["exp_avg_sq"])
        signal = second.mean(dim=1).sqrt()
        weight = (signal / signal.mean()).pow(power).clamp(max=4.0)
        expected = weight[:, None] * plain
        expected *= plain.norm() / expected.norm()
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-7)
        assert own.norm().item() == pytest.approx(plain.norm().item(), rel=1e-4)
    # One of each kind of layer in each of two blocks.
    assert [target.rows is None for target in built.hooks[0].targets] == [False, False, True] * 2


def test_power_zero_leaves_the_step_as_it_is(base_model: Any) -> None:
    built = rule("ResponsivePower", base_model, power=0.0, layers=LAYERS)
    for seed in range(2):
        whole, weighed = take_step(built, seed)
        for plain, own in zip(whole, weighed, strict=True):
            torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-8)


def test_a_trust_region_caps_how_far_selection_moves(base_model: Any) -> None:
    built = rule("SelectionTrustRegion", base_model, budget=1.0, keep_norm=False)
    take_step(built, 0)
    whole, weighed = take_step(built, 1)
    importance, slices = built.controller.importance.importance, built.controller.layout.site_slices
    for target, plain, own in zip(built.hooks[0].targets, whole, weighed, strict=True):
        responsiveness = importance[slices[target.site]]
        budget = (responsiveness * plain.norm(dim=1)).mean()
        moved = responsiveness * own.norm(dim=1)
        assert (moved <= budget * 1.001).all()
        untouched = responsiveness * plain.norm(dim=1) <= budget
        assert 0 < int(untouched.sum()) < len(untouched)
        torch.testing.assert_close(own[untouched], plain[untouched], rtol=1e-4, atol=1e-8)


def test_a_window_stops_whole_layers(base_model: Any) -> None:
    late = rule("TimeWindow", base_model, factor=0.0, end=1)
    whole, weighed = take_step(late, 0)
    assert all(step.norm() > 0 for step in whole)
    assert not any(step.any() for step in weighed)
    double = rule("TimeWindow", base_model, factor=2.0)
    whole, weighed = take_step(double, 0)
    for plain, own in zip(whole, weighed, strict=True):
        torch.testing.assert_close(own, 2 * plain, rtol=1e-4, atol=1e-7)


def test_what_a_rule_does_not_know_is_refused(base_model: Any) -> None:
    with pytest.raises(StudyError, match="weighs the layers 'gate', 'up' and 'down'"):
        rule("GradientSignal", base_model, layers=["router"])
    arm = Arm.from_options("candidate", {"hook": "benchmarks.study.candidates:ResponsivePower"})
    with pytest.raises(StudyError, match="needs importance"):
        built_on(base_model, arm)


def test_the_up_layer_is_held_where_the_mask_holds_the_gate(base_model: Any) -> None:
    built = rule("MaskOfUpLayer", base_model)
    take_step(built, 0)
    whole, weighed = take_step(built, 1)
    slices = built.controller.layout.site_slices
    for target, plain, own in zip(built.hooks[0].targets, whole, weighed, strict=True):
        kept = built.controller.weights[slices[target.site]]
        assert sorted(set(kept.tolist())) == [0.0, 1.0]
        assert plain.norm(dim=1).min() > 0
        torch.testing.assert_close(own, kept[:, None] * plain, rtol=1e-3, atol=1e-7)


def test_activity_is_averaged_over_tokens(base_model: Any) -> None:
    built = rule("ActivityWeighted", base_model)
    seen: dict[str, torch.Tensor] = {}
    sites = list(built.gates)
    for site in sites:
        site.lora_layer.register_forward_hook(lambda _, __, out, name=site.name: seen.setdefault(name, out.detach()))
    tokens = torch.randint(0, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    built.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss.backward()
    built.optimizer.step()
    z = torch.cat([seen[site.name].reshape(-1, site.channels) for site in sites], dim=1).requires_grad_()
    output = torch.nn.functional.silu(z)
    (derivative,) = torch.autograd.grad(output.sum(), z)
    expected = (output * derivative).abs().mean(dim=0).detach()
    torch.testing.assert_close(built.controller.importance.responsiveness, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("layers", "slow"), [("gate", 2), ("others", 4), ("all", 6), ("up_proj", 2)])
def test_a_is_slowed_by_its_learning_rate(base_model: Any, layers: str, slow: int) -> None:
    given = {"hook": "benchmarks.study.candidates:SlowA", "hook_options": {"factor": 0.25, "layers": layers}}
    built = built_on(base_model, Arm.from_options("slow", given))
    fast, slowed = built.optimizer.param_groups
    assert (fast["lr"], slowed["lr"]) == (0.01, 0.0025)
    names = {id(p): name for name, p in built.model.named_parameters()}
    found = [names[id(p)] for p in slowed["params"]]
    assert len(found) == slow
    parts = {"gate": ["gate_proj"], "others": ["up_proj", "down_proj"], "all": [""]}.get(layers, [layers])
    assert all("lora_A" in name and any(part in name for part in parts) for name in found)
    assert len(fast["params"]) + len(slowed["params"]) == 12


def test_no_layer_to_slow_is_refused(base_model: Any) -> None:
    with pytest.raises(StudyError, match="no layer is called 'router'"):
        rule("SlowA", base_model, factor=0.25, layers="router")


def test_a_trust_region_goes_with_a_slow_a(base_model: Any) -> None:
    both = rule("TrustRegionAndSlowA", base_model, factor=0.25, budget=1.0)
    alone = rule("SelectionTrustRegion", base_model, budget=1.0)
    for built in (both, alone):
        take_step(built, 0)
    for (name, own), (_, other) in zip(both.model.named_parameters(), alone.model.named_parameters(), strict=True):
        if own.requires_grad and not ("lora_A" in name and "gate_proj" in name):
            assert torch.equal(own, other), name
    assert [group["lr"] for group in both.optimizer.param_groups] == [0.01, 0.0025]


def test_every_hook_of_the_arms_is_found_under_the_name_that_its_cells_have() -> None:
    arms = yaml.safe_load(SPECIFICATION.read_text())["arms"]
    hooks = {options["hook"] for options in arms.values() if "hook" in options}
    assert len(hooks) == 12
    for name in hooks:
        assert hook_class(name).__name__ in (name.partition(":")[2], "EqualNorm")
    with pytest.raises(StudyError, match="the hook 'absent' does not exist"):
        hook_class("absent")


def built_with(name: str, base: Any, **options: Any) -> Any:
    """An arm with a candidate's hook, on the tiny base model."""
    given = {"hook": f"benchmarks.study.temporal_candidates:{name}", "hook_options": options}
    return built_on(base, Arm.from_options("rule", given))


def adapters_of(built: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in built.model.named_parameters() if p.requires_grad}


def take_whole_step(built: Any, step: int) -> tuple[dict[str, torch.Tensor], ...]:
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
        before, whole, now, gradients = take_whole_step(built, step)
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
    _, whole, now, _ = take_whole_step(built, 0)
    assert all(torch.equal(now[name], whole[name]) for name in now)
    _, whole, now, _ = take_whole_step(built, 1)
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
    built = built_on(base, Arm.from_options("arm", options))
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
