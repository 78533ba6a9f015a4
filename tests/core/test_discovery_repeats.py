"""A gate that several modules compute, such as of an embedding of time in each block, is one gate."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery import discover_gates
from na_lora_lightning.core.mechanisms.importance import ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale import StepScaleOptions
from na_lora_lightning.core.observation.observer import ObserverOptions


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


def test_other_activations_and_other_values_are_gates_of_their_own() -> None:
    assert len(discover_gates(with_lora(Denoiser(nn.SiLU(), nn.GELU())), INPUTS)) == 2
    assert len(discover_gates(with_lora(Denoiser(nn.SiLU(), nn.SiLU(), changed=True)), INPUTS)) == 2


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
