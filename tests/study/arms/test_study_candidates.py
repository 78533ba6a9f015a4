"""Candidate rules: what they do to one step, against sums written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml

from benchmarks.study import StudyError
from benchmarks.study.arms.arm import Arm
from benchmarks.study.arms.building import build, hook_class
from benchmarks.study.arms.candidates import RowRule
from benchmarks.study.base_models import loading
from benchmarks.study.report.evidence import STUDIES

MEASURE = {"keep_fraction": 1.0, "warmup_steps": 0}
LAYERS = ["gate", "up", "down"]


def rule(name: str, base: Any, **options: Any) -> Any:
    """An arm with a candidate's hook, on the tiny base model."""
    given = {"hook": f"benchmarks.study.candidates:{name}", "hook_options": options}
    if name in ("ResponsivePower", "SelectionTrustRegion", "TrustRegionAndSlowA"):
        given["importance"] = MEASURE
    elif name in ("MaskOfUpLayer", "ActivityWeighted"):
        given["importance"] = {"warmup_steps": 0, "refresh_every": 1}
    arm = Arm.from_options("candidate", given)
    lora = {"rank": 2, "alpha": 4, "targets": "ffn"}
    settings = {"steps": 4, "weight_decay": 0.0}
    return build(loading.fresh_model(str(base), "float32", torch.device("cpu")), arm, lora, settings, 0.01, 0)


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
    model = loading.fresh_model(str(base_model), "float32", torch.device("cpu"))
    with pytest.raises(StudyError, match="needs importance"):
        build(model, arm, {"rank": 2, "alpha": 4, "targets": "ffn"}, {"steps": 4, "weight_decay": 0.0}, 0.01, 0)


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
    model = loading.fresh_model(str(base_model), "float32", torch.device("cpu"))
    settings = {"steps": 4, "weight_decay": 0.0}
    built = build(model, Arm.from_options("slow", given), {"rank": 2, "alpha": 4, "targets": "ffn"}, settings, 0.01, 0)
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


def test_every_hook_of_the_arms_file_is_found_under_the_name_that_its_cells_have() -> None:
    arms = yaml.safe_load((STUDIES / "arms.yaml").read_text())
    hooks = {options["hook"] for options in arms.values() if "hook" in options}
    assert len(hooks) == 12
    for name in hooks:
        assert hook_class(name).__name__ in (name.partition(":")[2], "EqualNorm")
    with pytest.raises(StudyError, match="the hook 'absent' does not exist"):
        hook_class("absent")
