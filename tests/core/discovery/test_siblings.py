"""Gates that are told by another: experts that a probe sends no token to, and gates that several modules compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from na_lora_lightning import nonlinearity_aware
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale import StepScaleOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.core.sites import GateMap
from na_lora_lightning.errors import DiscoveryError

WIDTH, INNER, EXPERTS = 8, 12, 4


class Expert(nn.Module):
    """A gated network, whose gate is a module or a function, with a limit that its text does not tell."""

    def __init__(self, activation: nn.Module | Callable[[Tensor], Tensor], limit: float = 7.0) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(WIDTH, 2 * INNER), nn.Linear(INNER, WIDTH)
        self.act, self.limit = activation, limit

    def forward(self, x: Tensor) -> Tensor:
        z, other = self.both(x).chunk(2, dim=-1)
        return self.down(self.act(z.clamp(max=self.limit)) * other)


class Mixture(nn.Module):
    def __init__(self, experts: list[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({f"expert_{number}": expert for number, expert in enumerate(experts)})

    def forward(self, x: Tensor, routes: Tensor) -> Tensor:
        flat, result = x.reshape(-1, WIDTH), torch.zeros_like(x).reshape(-1, WIDTH)
        for number, expert in enumerate(self.experts.values()):
            place = (routes.reshape(-1) == number).nonzero().flatten()
            if len(place):
                result = result.index_add(0, place, expert(flat[place]))
        return x + result.view_as(x)


class Network(nn.Module):
    def __init__(self, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList([Mixture([make(number) for number in range(EXPERTS)]) for _ in range(2)])

    def forward(self, x: Tensor, routes: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x, routes)
        return x


def gates_of(make: Callable[[int], nn.Module], *routes: int) -> GateMap:
    torch.manual_seed(0)
    model: Any = get_peft_model(Network(make), LoraConfig(r=2, target_modules=["both"]))  # type: ignore[arg-type]
    return discover_gates(model, {"x": torch.randn(1, len(routes), WIDTH), "routes": torch.tensor([routes])})


def described(gates: GateMap) -> list[tuple[Any, ...]]:
    return [
        (
            *(site.name, site.kind, site.activation.name, site.lora_layer_name, site.rows.tolist()),
            *(site.output_layer_name, type(site.picked_from), type(site.source), site.calls),
        )
        for site in gates
    ]


@pytest.mark.parametrize("activation", [nn.SiLU, lambda: functional.silu])
@pytest.mark.parametrize("routes", [(0, 1, 1), (2, 2, 2)])
def test_some_experts_show_the_gates_of_all(activation: Callable[[], Any], routes: tuple[int, ...]) -> None:
    """Also where one expert is given all tokens."""
    seen = gates_of(lambda _: Expert(activation()), *routes)
    all_reached = gates_of(lambda _: Expert(activation()), 0, 1, 2, 3)
    assert described(seen) == described(all_reached)
    assert seen.left_out == []
    assert [site.lora_layer_name for site in seen.require()] == [
        f"layers.{layer}.experts.expert_{number}.both" for layer in range(2) for number in range(EXPERTS)
    ]
    for site in seen:
        root = site.lora_layer_name.removesuffix(".both")
        assert (site.output_layer_name, site.picked_from is None) == (f"{root}.down", False)
    assert len({id(site.lora_layer) for site in seen}) == len({id(site.source.module) for site in seen}) == 2 * EXPERTS


@pytest.mark.parametrize(
    "other",
    [lambda: Expert(nn.GELU()), lambda: Expert(nn.SiLU(), limit=5.0), lambda: nn.Sequential(Expert(nn.SiLU()))],
)
def test_experts_that_differ_are_not_taken_for_each_other(other: Callable[[], nn.Module]) -> None:
    gates = gates_of(lambda number: other() if number == 3 else Expert(nn.SiLU()), 0, 1)
    assert len(gates.sites) == 6
    with pytest.raises(DiscoveryError, match=r"expert_3\..*act.*pass example_inputs that reach every part with LoRA"):
        gates.require()


def test_a_shared_activation_module_tells_nothing_of_other_experts() -> None:
    shared = nn.SiLU()
    gates = gates_of(lambda _: Expert(shared), 0, 1)
    assert len(gates.sites) == 4
    with pytest.raises(DiscoveryError, match=r"expert_2\..*pass example_inputs that reach every part with LoRA"):
        gates.require()


def test_functions_that_were_not_called_and_have_no_sibling_are_named() -> None:
    gates = gates_of(lambda number: Expert(functional.gelu if number else functional.silu), 0)
    names = [f"layers.{layer}.experts.expert_{number}.both" for layer in range(2) for number in range(1, EXPERTS)]
    assert [entry.name for entry in gates.left_out] == names
    assert all("the probe's forward pass did not call it" in entry.reason for entry in gates.left_out)


def test_switch_transformers_train_without_example_inputs() -> None:
    torch.manual_seed(0)
    sizes: Any = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    sizes |= {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 8}
    config = SwitchTransformersConfig(vocab_size=32, dense_act_fn="gelu", decoder_start_token_id=0, **sizes)
    model = get_peft_model(
        SwitchTransformersForConditionalGeneration(config), LoraConfig(r=2, target_modules=["wi", "wo"])
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens: dict[str, Tensor] = {}
    with nonlinearity_aware(model, optimizer, importance=ImportanceOptions(warmup_steps=0)) as controller:
        assert len(controller.gates) == 2 * (1 + config.num_experts)
        for site in controller.gates:
            site.lora_layer.register_forward_hook(
                lambda _, args, __, name=site.lora_layer_name: tokens.update({name: args[0]})
            )
        ids = torch.randint(2, 32, (2, 9))
        mask = (torch.arange(9) < torch.tensor([[9], [4]])).long()
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        counts = controller.observer._tokens.view(2, -1).sum(1)  # type: ignore[union-attr]
        optimizer.step()
    # The first layer of each half has one network and the second experts, to one of which each token goes.
    assert counts.tolist() == [2 * 13, 2 * 18]
    assert 2 < len(tokens) < 2 * (1 + config.num_experts)


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
    controller.set_step_scale(StepScaleOptions(granularity="channel", normalize=True))
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
