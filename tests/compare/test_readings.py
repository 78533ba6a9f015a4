"""Readings of the paper as candidates: each changes what it says and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import seed_everything
from module_helpers import Batches, quiet_trainer, saved_model, some_batches
from torch import Tensor

from benchmarks.real_weights import readings
from benchmarks.real_weights.readings import (
    ChangeOfSelection,
    DegreeScale,
    DriftOfSelection,
    ForwardMask,
    MaskedGradient,
    Reading,
    RegionScale,
    Sensitivity,
    SignScale,
    TokenGradient,
)
from na_lora_lightning import LoRAOptions, NALoRALightningModule, ScheduleOptions
from na_lora_lightning.arguments import AdapterOptions
from na_lora_lightning.compare.controls import GateStepCallback, ShortGateSteps
from na_lora_lightning.core.lora_layers import lora_a, lora_b

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_model(tmp_path_factory.mktemp("readings") / "base")


def trained(base: str, folder: Path, callback: GateStepCallback | None, steps: int = 4) -> dict[str, Tensor]:
    seed_everything(0, verbose=False)
    module = NALoRALightningModule(
        base,
        lora=LoRAOptions(r=2, alpha=4),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-2, weight_decay=0.0),
        schedule=ScheduleOptions(name="constant", warmup_fraction=0.0),
        adapter=AdapterOptions(write="never"),
    )
    trainer = quiet_trainer(folder, callbacks=[] if callback is None else [callback])
    trainer.fit(module, Batches(some_batches(steps)))
    return {name: value.detach().clone() for name, value in module.peft_model.named_parameters() if "lora" in name}


GATE_B = "gate_proj.lora_B"


def of_gates(weights: dict[str, Tensor]) -> list[Tensor]:
    return [value for name, value in weights.items() if GATE_B in name]


class Recorded:
    """Remembers the gates' B after each step."""

    def __init__(self, callback: GateStepCallback) -> None:
        self.steps: list[list[Tensor]] = []
        after = callback._after_step

        def record(optimizer: Any, *rest: Any) -> None:
            after(optimizer, *rest)
            self.steps.append([parameter.detach()[rows].clone() for parameter, rows, _ in callback._rows])

        callback._after_step = record  # type: ignore[method-assign]


def test_a_factor_of_one_is_plain_lora_and_of_zero_leaves_the_gates(base: str, tmp_path: Path) -> None:
    plain = trained(base, tmp_path, None)
    same = trained(base, tmp_path, ShortGateSteps(factor=1.0))
    assert all(torch.equal(plain[name], same[name]) or GATE_B in name for name in plain)
    for mine, its in zip(of_gates(plain), of_gates(same), strict=True):
        torch.testing.assert_close(mine, its)
    assert all(not value.any() for value in of_gates(trained(base, tmp_path, ShortGateSteps(factor=0.0))))


@pytest.mark.parametrize(
    "callback",
    [
        ChangeOfSelection(warmup=1, every=1),
        DriftOfSelection(warmup=1, every=1),
        Sensitivity(warmup=1, every=1),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_masked_rows_wait(base: str, tmp_path: Path, callback: Any) -> None:
    recorded = Recorded(callback)
    trained(base, tmp_path, callback)
    for former, now, mask in zip(recorded.steps[-2], recorded.steps[-1], callback.masks, strict=True):
        assert mask.sum() == 12
        moved = (now != former).any(dim=1)
        assert not moved[mask == 0].any()
        assert moved[mask == 1].all()


def test_a_masked_gradient_moves_rows_by_momentum_alone(base: str, tmp_path: Path) -> None:
    callback = MaskedGradient(warmup=0, every=100)
    weights = trained(base, tmp_path, callback)
    for value, mask in zip(of_gates(weights), callback.masks, strict=True):
        assert mask is not None
        # Masked from the first step on, a row has no momentum.
        assert not value[mask == 0].any()
        assert value[mask == 1].any(dim=1).all()
    late = MaskedGradient(warmup=2, every=100)
    assert all(value.any(dim=1).all() for value in of_gates(trained(base, tmp_path, late)))


def test_the_forward_mask_ends_with_rows_of_zero_and_brings_them_back(base: str, tmp_path: Path) -> None:
    callback = ForwardMask(warmup=1, every=1, statistic="random")
    recorded = Recorded(callback)
    weights = trained(base, tmp_path, callback, steps=6)
    for value, mask in zip(of_gates(weights), callback.masks, strict=True):
        assert mask is not None
        assert torch.equal(value.any(dim=1), mask == 1)
    ever = torch.stack([step[0].any(dim=1) for step in recorded.steps]).sum(dim=0)
    assert ((ever > 1) & (ever < 6)).any()


def test_a_token_threshold_of_nothing_is_plain_lora(base: str, tmp_path: Path) -> None:
    plain = trained(base, tmp_path, None)
    for tau, is_same in ((-1.0, True), (0.9, False)):
        found = trained(base, tmp_path, TokenGradient(tau=tau))
        gates = [name for name in plain if "gate_proj" in name]
        close = [torch.allclose(plain[name], found[name], atol=2e-4) for name in gates]
        assert all(close) == is_same
    assert all(not value.any() for value in of_gates(trained(base, tmp_path, TokenGradient(tau=9.0))))


def test_the_sensitivity_is_the_gradient_of_the_pre_activation(base: str, tmp_path: Path) -> None:
    callback = Sensitivity(warmup=0, every=1)
    seen: list[Tensor] = []
    inner = callback.add

    def add(index: int, values: Tensor) -> None:
        if index == 1:
            seen.append(values)
        inner(index, values)

    callback.add = add  # type: ignore[method-assign]
    trained(base, tmp_path, callback, steps=1)
    assert len(seen) == 1
    torch.testing.assert_close(callback.corrected(1), seen[0].mean(dim=0))


def test_what_lora_adds_is_known(base: str, tmp_path: Path) -> None:
    class Checked(Reading):
        checked = 0

        def see(self, index: int, z: Tensor) -> None:
            site = self.gates.sites[index]
            x = self.inputs[index]
            assert x is not None
            expected = site.lora_layer(x) - site.lora_layer.base_layer(x)
            torch.testing.assert_close(self.delta(index), expected.detach(), atol=1e-5, rtol=1e-4)
            self.checked += 1

    class Once(Checked):
        def _see(self, index: int, z: Tensor) -> None:
            kept = list(self.inputs)
            super()._see(index, z)
            self.inputs = kept

    callback = Once()
    trained(base, tmp_path, callback, steps=3)
    assert callback.checked == 6


def test_step_scales_multiply_the_step(base: str, tmp_path: Path) -> None:
    for callback, lowest, highest in ((RegionScale(), 0.5, 1.0), (SignScale(), 0.5, 1.0), (DegreeScale(), 0.5, 2.0)):
        plain: list[Tensor] = []
        weights = callback.weights

        def keep(index: int, moved: Tensor, weights: Any = weights, plain: Any = plain) -> Tensor:
            plain.append(weights(index, moved))
            return plain[-1]

        callback.weights = keep  # type: ignore[method-assign]
        trained(base, tmp_path, callback, steps=2)
        found = torch.cat(plain)
        assert found.min() >= lowest
        assert found.max() <= highest
        assert len(plain) == 4
    sign = SignScale(positive=1.0, negative=0.0)
    trained(base, tmp_path, sign, steps=1)
    share = sign.corrected(0)
    torch.testing.assert_close(sign.weights(0, torch.zeros(24, 2)), share)
    assert ((share * 12).round() - share * 12).abs().max() < 1e-3


def test_every_arm_names_a_reading() -> None:
    arms = yaml.safe_load((ROOT / "benchmarks" / "real_weights" / "arms.yaml").read_text())
    # The other is the package's own.
    assert arms.pop("activation_scale").keys() == {"step_scale.granularity", "step_scale.normalize"}
    for options in arms.values():
        (callback,) = options["trainer.callbacks"]
        name = callback["class_path"].rpartition(".")[2]
        assert issubclass(getattr(readings, name), Reading)
        getattr(readings, name)(**callback.get("init_args", {}))
    assert lora_a is not lora_b
