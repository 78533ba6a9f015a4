"""A gate that several modules compute, such as of an embedding of time in each block, is one gate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery import discover_gates
from na_lora_lightning.core.mechanisms.importance import ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale import StepScaleOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.errors import DiscoveryError


class Block(nn.Module):
    """Takes the embedding by an activation of its own, as a residual block of a UNet does."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act, self.proj = act, nn.Linear(8, 4)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x + self.proj(self.act(time))[:, None]


class Denoiser(nn.Module):
    def __init__(self, *acts: nn.Module, changed: bool = False) -> None:
        super().__init__()
        self.time, self.changed = nn.Linear(4, 8), changed
        self.blocks = nn.ModuleList(map(Block, acts))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time(t)
        for block in self.blocks:
            x = block(x, time)
            time = time * 2 if self.changed else time
        return x


_DRAWN = torch.Generator().manual_seed(0)
INPUTS = {"x": torch.randn(2, 5, 4, generator=_DRAWN), "t": 3.0 * torch.randn(2, 4, generator=_DRAWN)}


def with_lora(model: nn.Module) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["time"], init_lora_weights=False))


def test_it_has_one_site_and_the_others_say_which() -> None:
    gates = discover_gates(with_lora(Denoiser(nn.SiLU(), nn.SiLU(), nn.SiLU())), INPUTS).require()
    assert [(site.name, site.lora_layer_name) for site in gates] == [("blocks.0.act", "time")]
    repeats = {entry.name: entry.reason for entry in gates.left_out}
    reason = "it repeats blocks.0.act, which stands for both"
    assert repeats == {"blocks.1.act": reason, "blocks.2.act": reason}


def test_other_values_of_the_same_rows_are_one_gate_of_all_of_them() -> None:
    model = with_lora(Denoiser(nn.SiLU(), nn.SiLU(), changed=True))
    gates = discover_gates(model, INPUTS).require()
    assert [(site.name, site.lora_layer_name) for site in gates] == [("blocks.0.act", "time")]
    controller = GateController(model, gates, ObserverOptions(max_tokens=None))
    controller.set_importance(ImportanceOptions(criterion="output_derivative", warmup_steps=0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    controller.attach([optimizer])
    model(**INPUTS).sum().backward()
    optimizer.step()
    controller.detach()
    time = model.base_model.model.time(INPUTS["t"]).detach().double()  # type: ignore[operator]
    expected = reference.responsiveness("output_derivative", "silu", torch.cat([time, 2 * time]).tolist())
    assert controller.importance.importance.tolist() == pytest.approx(expected, abs=2e-6)  # type: ignore[union-attr]
    assert not any(block.act._forward_pre_hooks for block in model.base_model.model.blocks)  # type: ignore[union-attr]


class Twice(nn.Module):
    """One layer in two places, with functions or modules behind it."""

    def __init__(self, *functions: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.time, self.down, self.functions = nn.Linear(4, 8), nn.Linear(8, 4), functions
        self.known = nn.ModuleList(function for function in functions if isinstance(function, nn.Module))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for function in self.functions:
            t = t + self.down(function(self.time(t)))
        return t


def test_a_layer_with_the_same_function_in_two_places_is_one_gate() -> None:
    (site,) = discover_gates(with_lora(Twice(functional.silu, functional.silu)), INPUTS).require()
    assert (site.name, site.activation.name, site.lora_layer_name) == ("silu", "silu", "time")


@pytest.mark.parametrize(
    ("model", "others"),
    [
        (lambda: Denoiser(nn.SiLU(), nn.GELU()), {"blocks.0.act": "blocks.1.act", "blocks.1.act": "blocks.0.act"}),
        (lambda: Twice(functional.silu, functional.gelu), {"silu": "gelu", "gelu": "silu"}),
        (lambda: Twice(nn.SiLU(), functional.silu), {"known.0": "silu", "silu": "known.0"}),
    ],
)
def test_rows_of_different_gates_are_refused(model: Callable[[], nn.Module], others: dict[str, str]) -> None:
    """Held or scaled for each, they would be twice."""
    gates = discover_gates(with_lora(model()), INPUTS)
    assert not gates.sites
    with pytest.raises(DiscoveryError, match=r"2 layers with LoRA cannot be masked .* time that make it make .* too"):
        gates.require()
    reasons = {entry.name: entry.reason for entry in gates.left_out}
    assert set(reasons) == set(others)
    assert all(f"that make it make {others[name]} too" in reason for name, reason in reasons.items())


def moved(blocks: int) -> Tensor:
    """How far the rows of the embedding move in a step, as a multiple of what they would without the step scale."""
    torch.manual_seed(0)
    model = with_lora(Denoiser(*(nn.SiLU() for _ in range(blocks)))).double()
    inputs = {name: value.double() for name, value in INPUTS.items()}
    controller = GateController(model, discover_gates(model, inputs), ObserverOptions(max_tokens=None))
    controller.set_importance(ImportanceOptions(keep_fraction=1.0, warmup_steps=0))
    controller.set_step_scale(StepScaleOptions())
    (site,) = controller.gates
    parameter = site.parameters()[0].parameter
    optimizer = torch.optim.SGD([parameter], lr=1e-6)
    controller.attach([optimizer])
    for _ in range(3):
        before = parameter.detach().clone()
        optimizer.zero_grad()
        model(**inputs).sum().backward()
        assert parameter.grad is not None
        optimizer.step()
    ratio = ((parameter.detach() - before) / (-1e-6 * parameter.grad)).mean(dim=1)
    controller.detach()
    return ratio


def test_its_rows_are_scaled_once() -> None:
    alone = moved(1)
    assert alone.std() > 0.01
    torch.testing.assert_close(moved(3), alone, rtol=1e-4, atol=1e-6)
