"""DoRA in some layers: which keep a magnitude, and that both kinds of layer compute what they should."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.study.arms.arm import Arm
from benchmarks.study.arms.building import build
from benchmarks.study.arms.hooks import BuiltArm
from benchmarks.study.base_models import loading
from benchmarks.study.errors import StudyError
from na_lora_lightning.core.lora_layers import is_lora_layer, lora_a, lora_b

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
