"""Experts that are a pair of linear layers each, and are given the tokens that were picked for them."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.gathered import places
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.observation.observer import ObserverOptions

EXPERTS, CHANNELS = 3, 12


class Expert(nn.Module):
    def __init__(self, functional_gate: bool) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, CHANNELS), nn.SiLU(), nn.Linear(CHANNELS, 8)
        self.functional_gate = functional_gate

    def forward(self, x: Tensor) -> Tensor:
        z = self.up(x)
        return self.down(functional.silu(z) if self.functional_gate else self.act(z))


class Mixture(nn.Module):
    """Each token goes to the expert of its number and to the next one."""

    def __init__(self, functional_gate: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Expert(functional_gate) for _ in range(EXPERTS)])

    def forward(self, hidden: Tensor, routes: Tensor) -> Tensor:
        flat, result = hidden.reshape(-1, 8), torch.zeros_like(hidden).reshape(-1, 8)
        for number, expert in enumerate(self.experts):
            place = ((routes.reshape(-1) == number) | (routes.reshape(-1) + 1 == number)).nonzero().flatten().flip(0)
            if len(place):
                result = result.index_add(0, place, expert(flat[place]))
        return hidden + result.view_as(hidden)


class Network(nn.Module):
    def __init__(self, functional_gate: bool) -> None:
        super().__init__()
        self.embed, self.first = nn.Embedding(32, 8), nn.Linear(8, 8)
        self.layers = nn.ModuleList([Mixture(functional_gate) for _ in range(2)])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.first(self.embed(input_ids))
        for layer in self.layers:
            hidden = layer(hidden, input_ids % 3)
        return hidden


@pytest.mark.parametrize("functional_gate", [False, True])
@pytest.mark.parametrize("masked", [True, False])
def test_statistics_are_those_of_the_real_tokens_that_were_picked(functional_gate: bool, masked: bool) -> None:
    torch.manual_seed(0)
    model: Any = get_peft_model(Network(functional_gate), LoraConfig(r=2, target_modules=["up"]))
    example = {"input_ids": torch.arange(6)[None]}
    gates = discover_gates(model, example).require()
    assert len(gates) == 2 * EXPERTS
    assert {type(site.picked_from) for site in gates} == {Mixture}
    controller = GateController(model, gates, ObserverOptions(max_tokens=None))
    controller.set_importance(ImportanceOptions(criterion="output_derivative", warmup_steps=0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    controller.attach([optimizer])
    seen: dict[str, Tensor] = {}
    for site in gates:

        def keep(_: nn.Module, __: Any, output: Tensor, name: str = site.lora_layer_name) -> None:
            seen[name] = output.detach()

        site.lora_layer.register_forward_hook(keep)
    # No token of number 2 modulo 3, and the third expert's are those that follow number 1.
    ids = torch.tensor([[3, 4, 6, 7, 10], [9, 12, 1, 13, 15]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]) if masked else torch.ones(2, 5).long()
    model(input_ids=ids, **({"attention_mask": mask} if masked else {})).sum().backward()
    tokens = controller.observer._tokens.tolist()  # type: ignore[union-attr]
    optimizer.step()
    controller.detach()
    importance = controller.importance.importance.split(CHANNELS)  # type: ignore[union-attr]
    for site, count, found in zip(gates, tokens, importance, strict=True):
        number = int(site.lora_layer_name.split(".")[3])
        routes = ids.reshape(-1) % 3
        order = ((routes == number) | (routes + 1 == number)).nonzero().flatten().flip(0)
        real = mask.reshape(-1)[order].bool()
        rows = seen[site.lora_layer_name].double()[real].tolist()
        assert count == len(rows)
        expected = reference.responsiveness("output_derivative", "silu", rows)
        assert found.tolist() == pytest.approx(expected, abs=2e-6)


def test_an_expert_without_tokens_is_no_error_and_as_many_as_sequences_are_no_pooled_ones() -> None:
    torch.manual_seed(0)
    model: Any = get_peft_model(Network(False), LoraConfig(r=2, target_modules=["up"]))
    gates = discover_gates(model, {"input_ids": torch.arange(6)[None]}).require()
    controller = GateController(model, gates, ObserverOptions(max_tokens=None))
    controller.set_importance(ImportanceOptions(warmup_steps=0))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    controller.attach([optimizer])
    # Two tokens for the third expert, of which one is padding, in a batch of two sequences.
    ids, mask = torch.tensor([[1, 3, 4], [3, 3, 3]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    model(input_ids=ids, attention_mask=mask).sum().backward()
    assert controller.observer._tokens.tolist()[:3] == [4.0, 5.0, 1.0]  # type: ignore[union-attr]
    optimizer.step()
    optimizer.zero_grad()
    model(input_ids=ids[1:], attention_mask=mask[1:]).sum().backward()
    assert controller.observer._tokens.tolist()[:3] == [3.0, 3.0, 0.0]  # type: ignore[union-attr]
    optimizer.step()
    assert bool(controller.importance.importance.isfinite().all())  # type: ignore[union-attr]
    controller.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_found_by_their_bits(dtype: torch.dtype) -> None:
    among = torch.randn(50, 7).to(dtype)
    order = torch.randperm(50)[:20]
    found = places(among[order], among)
    assert found is not None
    assert torch.equal(among[found], among[order])
    assert places(torch.randn(3, 7).to(dtype), among) is None
