"""LoRA layers that are given the same input as one function: outputs and gradients against PEFT's, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import LLAMA_TARGETS, random_batch, tiny_llama
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from na_lora_lightning import use_fast_lora_layers
from na_lora_lightning.models import lora_siblings
from na_lora_lightning.models.lora_siblings import Member, products

IN = 12
ROUNDING = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2e-2}


class Gates(nn.Module):
    """A gated block; what its layers are given, and whether they are called, is up to the test."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(IN, 10, bias), nn.Linear(IN, 10, bias)
        self.down_proj = nn.Linear(10, IN, bias)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return result


class OtherInput(Gates):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(2.0 * x))
        return result


class UpFirst(Gates):
    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        result: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * up)
        return result


class NotCalled(Gates):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)))
        return result


class Twice(Gates):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x)) + super().forward(x)


class InPlace(Gates):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x).mul_(2.0)
        up = self.up_proj(x).sigmoid_()
        result: Tensor = self.down_proj(gate * up)
        return result


class InputChanged(Gates):
    def forward(self, x: Tensor) -> Tensor:
        x = 1.0 * x
        with torch.no_grad():
            gate = self.gate_proj(x)
        value = self.gate_proj(x.clone())
        x += 1.0
        result: Tensor = self.down_proj(value * self.up_proj(x) + gate)
        return result


NETWORKS = [Gates, OtherInput, UpFirst, NotCalled, Twice, InPlace, InputChanged]


def adapted(network: nn.Module, base: torch.dtype, adapter: torch.dtype, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    targets = ["gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": targets} | options)
    model: PeftModel = get_peft_model(network.to(base), config, autocast_adapter_dtype=False)  # type: ignore[assignment, arg-type]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (parameter.data + 0.3 * torch.randn_like(parameter)).to(adapter)
    return model.train()


def pass_through(
    model: nn.Module, x: Tensor, autocast: bool = False, run: Callable[..., Tensor] | None = None
) -> dict[str, Tensor | None]:
    """Output and gradients of the input and of the trained parameters."""
    x = x.detach().clone().requires_grad_(True)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = run(model, x) if run else model(x)
    y.backward(torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).view(y.shape))
    return {"output": y.detach(), "input": x.grad} | {n: p.grad for n, p in model.named_parameters()}


def require_equal(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    for name, value in expected.items():
        mine = found[name]
        assert value is mine is None or torch.equal(mine, value), name  # type: ignore[arg-type]


class Calls:
    """How many layers each call of the common function computed."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, x: Tensor, members: list[Member], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        self.sizes.append(len(members))
        return products(x, members, dtype)


@pytest.fixture
def calls() -> Any:
    counted = Calls()
    with patch.object(lora_siblings, "products", counted):
        yield counted


@settings(max_examples=60, deadline=None)
@given(
    network=st.sampled_from(NETWORKS),
    bias=st.booleans(),
    shape=st.sampled_from([(5,), (2, 3), (2, 1, 4)]),
    dtypes=st.sampled_from([(torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16,) * 2]),
    autocast=st.booleans(),
    options=st.sampled_from([{}, {"rank_pattern": {"up_proj": 5}}, {"alpha_pattern": {"up_proj": 9}}]),
)
def test_outputs_and_gradients_are_those_of_peft_to_rounding(
    network: type[Gates],
    bias: bool,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    autocast: bool,
    options: dict[str, Any],
) -> None:
    autocast &= torch.float64 not in dtypes
    model = adapted(network(bias), *dtypes, **options)
    twin = copy.deepcopy(model)
    use_fast_lora_layers(twin)
    x = torch.randn(*shape, IN, generator=torch.Generator().manual_seed(3)).to(dtypes[0])
    rounding = ROUNDING[torch.bfloat16 if autocast else dtypes[0]]
    exact, theirs = pass_through(copy.deepcopy(model).double(), x.double()), pass_through(model, x, autocast)
    for _ in range(2):
        ours = pass_through(twin, x, autocast)
        for name, value in exact.items():
            mine, other = ours[name], theirs[name]
            if value is None or mine is None or other is None:
                assert mine is value or mine is other or not mine.any(), name  # type: ignore[union-attr]
                continue
            assert (mine.dtype, mine.shape) == (other.dtype, other.shape), name
            own, peft = (float((found.double() - value).norm()) for found in (mine, other))
            assert own <= 2 * peft + rounding * float(value.norm()), (name, own, peft)


def test_query_key_value_and_gate_up_are_computed_together(calls: Calls) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=LLAMA_TARGETS)
    model: PeftModel = get_peft_model(tiny_llama(), config)  # type: ignore[assignment, arg-type]
    use_fast_lora_layers(model)
    model.train()(**random_batch(0))
    layers = model.config.num_hidden_layers
    families = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    together = [names for family in families if len(names := [name for name in family if name in LLAMA_TARGETS]) > 1]
    assert calls.sizes == [len(names) for names in together] * layers
    for quiet in (torch.no_grad, torch.inference_mode):
        calls.sizes.clear()
        with quiet():
            model(**random_batch(0))
        assert calls.sizes == [len(names) for names in together] * layers


@pytest.mark.parametrize(
    "case",
    ["dropout", "dora", "lora_bias", "frozen A", "trained base", "mixed dtypes", "switched off", "across"],
)
def test_what_is_more_than_lora_alone_is_computed_by_itself(case: str, calls: Calls) -> None:
    options = {"dropout": {"lora_dropout": 0.2}, "dora": {"use_dora": True}, "lora_bias": {"lora_bias": True}}
    network: nn.Module = nn.ModuleDict({"crossattention": Gates(case == "lora_bias")})["crossattention"]
    if case == "across":
        network = nn.Sequential()
        network.add_module("crossattention", Gates())
    adapter = torch.float64 if case == "mixed dtypes" else torch.float32
    model = adapted(network, torch.float32, adapter, **options.get(case, {}))
    use_fast_lora_layers(model)
    for name, parameter in model.named_parameters():
        if (case == "frozen A" and "up_proj.lora_A" in name) or (
            case == "trained base" and "gate_proj.base_layer" in name
        ):
            parameter.requires_grad_(case == "trained base")
    if case == "switched off":
        use_fast_lora_layers(model, enable=False)
    model(torch.randn(2, IN))
    assert calls.sizes == []


def test_answers_that_were_not_fetched_are_not_those_of_later() -> None:
    model, x = adapted(Gates(), torch.float32, torch.float32), torch.randn(4, IN)
    use_fast_lora_layers(model)
    gates = model.base_model.model
    with torch.no_grad():
        gates.gate_proj(x)
    assert gates.up_proj(x).requires_grad
    gates.gate_proj(x)
    before = gates.up_proj(x)
    gates.gate_proj(x)
    with torch.no_grad():
        gates.up_proj.lora_B["default"].weight.mul_(2.0)
    assert not torch.equal(gates.up_proj(x), before)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpoints_give_the_same_bits(use_reentrant: bool, calls: Calls) -> None:
    model, x = adapted(Gates(), torch.float32, torch.float32), torch.randn(4, IN)
    use_fast_lora_layers(model)
    again = pass_through(model, x, run=lambda model, given: checkpoint(model, given, use_reentrant=use_reentrant))
    assert calls.sizes == [2, 2]
    require_equal(again, pass_through(model, x))


def test_second_derivatives_are_right() -> None:
    def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights = [torch.linspace(-1, 1, 20).double().view(4, 5), torch.linspace(1, -1, 15).double().view(3, 5)]
        members = [
            Member(w, None, a, b, s) for w, a, b, s in zip(weights, tensors[:2], tensors[2:], (2.0, 0.5), strict=True)
        ]
        return tuple(result for result, _ in products(x, members, torch.float64))

    torch.manual_seed(0)
    shapes = ((3, 5), (2, 5), (1, 5), (4, 2), (3, 1))
    given_ = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(run, given_)
    assert torch.autograd.gradgradcheck(run, given_)


def test_the_input_is_kept_once_and_copies_begin_anew() -> None:
    model = adapted(Gates(), torch.float32, torch.float32)
    use_fast_lora_layers(model)
    x = torch.randn(6, IN, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    gates = model.base_model.model
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gate, up = gates.gate_proj(x), gates.up_proj(x)
    assert sum(kept.values()) == 6 * 4 * (IN + 3 + 3)
    twin = copy.deepcopy(model)
    require_equal(pass_through(twin, x), pass_through(model, x))
    assert gate.shape == up.shape
