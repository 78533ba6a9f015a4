"""LoRA and DoRA in one autograd function against PEFT's own layers: outputs, every gradient, and what is kept."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import LLAMA_TARGETS, random_batch, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from na_lora_lightning import lora_layer_report, use_fast_lora_layers
from na_lora_lightning.models.fast_lora import FastLoRALinear

IN, OUT = 12, 7
# Some steps of a dtype's own rounding, as a fraction of the norm.
ROUNDING = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


class One(nn.Module):
    """A network of one layer."""

    def __init__(self, kind: str = "linear", bias: bool = True) -> None:
        super().__init__()
        self.layer = Conv1D(OUT, IN) if kind == "conv1d" else nn.Linear(IN, OUT, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


def adapted(
    base: torch.dtype = torch.float32, adapter: torch.dtype = torch.float32, kind: str = "linear", **options: Any
) -> PeftModel:
    """A network of one layer with an adapter that is not at its start, all parameters trained, in training mode."""
    torch.manual_seed(options.pop("seed", 0))
    network = One(kind, options.pop("bias", True)).to(base)
    config = LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": ["layer"], "fan_in_fan_out": kind == "conv1d"} | options
    )
    model: PeftModel = get_peft_model(network, config, autocast_adapter_dtype=False)  # type: ignore[assignment, arg-type]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(True)
        if "lora_" in name:
            parameter.data = (parameter.data + 0.3 * torch.randn_like(parameter)).to(adapter)
    return model.train()


def fast(model: PeftModel) -> PeftModel:
    """A copy with fast layers."""
    twin = copy.deepcopy(model)
    use_fast_lora_layers(twin)
    return twin


def pass_through(
    model: nn.Module,
    x: Tensor,
    autocast: torch.dtype | None = None,
    run: Callable[..., Tensor] | None = None,
    positive: bool = False,
) -> dict[str, Tensor]:
    """Output and gradients of the input and of all parameters, by name."""
    x = x.detach().clone().requires_grad_(True)
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = run(model, x) if run else model(x)
    gradient = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y.backward((gradient.abs() if positive else gradient).to(y.dtype))
    found = {"output": y.detach(), "input": x.grad}
    return found | {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}  # type: ignore[return-value]


def require_close(found: dict[str, Tensor], expected: dict[str, Tensor], rounding: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        difference = (found[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-30)
        assert float(difference) <= rounding, (name, float(difference))


DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(1,), (5,), (2, 3), (2, 1, 4), ()]),
    dtypes=st.sampled_from(DTYPES),
    autocast=st.sampled_from([None, None, torch.bfloat16, torch.float16]),
    kind=st.sampled_from(["linear", "conv1d"]),
    variant=st.sampled_from(
        [{}, {"lora_dropout": 0.4}, {"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}, {"bias": False}]
    ),
    r=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_outputs_and_all_gradients_are_those_of_peft_to_rounding(
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    autocast: torch.dtype | None,
    kind: str,
    variant: dict[str, Any],
    r: int,
    seed: int,
) -> None:
    if autocast is not None and torch.float64 in dtypes:
        autocast = None
    model = adapted(*dtypes, kind=kind, r=r, seed=seed, **({} if kind == "conv1d" and "bias" in variant else variant))
    twin = fast(model)
    assert not lora_layer_report(twin).left
    x = torch.randn(*shape, IN, generator=torch.Generator().manual_seed(seed)).to(dtypes[0])
    rounding = max(ROUNDING[dtype] for dtype in (*dtypes, autocast or dtypes[0]))
    ours, theirs = pass_through(twin, x, autocast), pass_through(model, x, autocast)
    exact = pass_through(copy.deepcopy(model).double(), x.double())
    # Of positive parts alone, as what is rounded where parts of a sum nearly cancel is the parts.
    positive = copy.deepcopy(model).double()
    for parameter in positive.parameters():
        parameter.data.abs_()
    parts = pass_through(positive, x.double().abs(), positive=True)
    for name, value in exact.items():
        assert (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape), name
        own, other = (float((found[name].double() - value).norm()) for found in (ours, theirs))
        size = max(float(each[name].norm()) for each in (exact, parts))
        assert own <= 2 * other + rounding * size, (name, own, other)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_gradients_and_second_derivatives_are_right_in_double_precision(kind: str, options: dict[str, Any]) -> None:
    model = fast(adapted(torch.float64, torch.float64, kind, r=2, **options))
    layer = model.base_model.model.layer
    assert type(layer) is FastLoRALinear
    held = dict(layer.named_parameters())
    if "use_dora" in options:
        # The norm is held fixed, so that a numerical derivative by what it is made of is another one.
        held = {name: parameter for name, parameter in held.items() if "magnitude" in name or "bias" in name}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        torch.manual_seed(3)
        result: Tensor = torch.func.functional_call(layer, dict(zip(held, values, strict=True)), (x,))
        return result

    x = torch.randn(2, 3, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    values = [parameter.detach().clone().requires_grad_(True) for parameter in held.values()]
    # functional_call puts in plain tensors, which the layer takes as it takes parameters.
    torch.autograd.gradcheck(run, (x, *values))
    torch.autograd.gradgradcheck(run, (x, *values))


def test_second_derivatives_of_dora_are_those_of_peft() -> None:
    model = adapted(torch.float64, torch.float64, use_dora=True)

    def second(network: PeftModel) -> list[Tensor]:
        x = torch.randn(4, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
        parameters = [x, *network.parameters()]
        first = torch.autograd.grad(network(x).square().sum(), parameters, create_graph=True)
        return list(torch.autograd.grad(sum(part.square().sum() for part in first), parameters))  # type: ignore[arg-type]

    for found, expected in zip(second(fast(model)), second(model), strict=True):
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)


def bytes_kept(model: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> int:
    """Of memory that autograd keeps, apart from parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    casts = torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), casts:
        y = model(x)
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    ("options", "autocast", "expected"),
    [
        # x, and h of three features.
        ({}, None, 4 * IN + 4 * 3),
        ({"base": torch.bfloat16}, None, 2 * IN + 4 * 3),
        ({"base": torch.bfloat16, "adapter": torch.bfloat16}, None, 2 * IN + 2 * 3),
        ({}, torch.bfloat16, 2 * IN + 2 * 3),
        # What dropout kept takes a byte for each element.
        ({"lora_dropout": 0.5}, None, 4 * IN + 4 * 3 + IN),
        # z, for the gradient of the magnitude; and once for all tokens the norms.
        ({"use_dora": True}, None, 4 * IN + 4 * 3 + 4 * OUT),
    ],
    ids=str,
)
def test_no_more_is_kept_for_the_backward_pass_than_is_needed(
    options: dict[str, Any], autocast: torch.dtype | None, expected: int
) -> None:
    model = adapted(**options)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    x = torch.randn(2, 5, IN).to(options.get("base", torch.float32)).requires_grad_(True)
    once = 4 * OUT if "use_dora" in options else 0
    assert bytes_kept(fast(model), x, autocast) == 10 * expected + once


def test_a_frozen_adapter_keeps_nothing() -> None:
    model = adapted().requires_grad_(False)
    assert bytes_kept(fast(model), torch.randn(2, 5, IN).requires_grad_(True)) == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("options", [{"lora_dropout": 0.3}, {"use_dora": True}], ids=str)
def test_gradient_checkpoints_give_the_same(options: dict[str, Any], use_reentrant: bool) -> None:
    twin, x = fast(adapted(**options)), torch.randn(4, IN)
    again = pass_through(twin, x, run=lambda model, given: checkpoint(model, given, use_reentrant=use_reentrant))
    require_close(again, pass_through(twin, x), 0.0)


def test_models_may_change_the_output_in_place() -> None:
    model, x = adapted(), torch.randn(2, 4, IN)

    def run(network: nn.Module, given: Tensor) -> Tensor:
        y: Tensor = network(given)
        return y.mul_(2.0).relu_()

    require_close(pass_through(fast(model), x, run=run), pass_through(model, x, run=run), ROUNDING[torch.float32])


def losses(model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = model(**random_batch(step % 4)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("options", [{"rank_pattern": {"q_proj": 1}}, {"use_dora": True}], ids=str)
def test_curves_lie_on_each_other_and_adapters_load_in_the_other(options: dict[str, Any], tmp_path: Path) -> None:
    def model(on: bool) -> PeftModel:
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=LLAMA_TARGETS, **options)
        # In double precision, as AdamW's first steps are signs, which rounding turns where a gradient is nearly 0.
        # The losses are float32 all the same.
        made: PeftModel = get_peft_model(tiny_llama().double(), config)  # type: ignore[assignment, arg-type]
        made.double()
        assert bool(use_fast_lora_layers(made, enable=on).fast) == on
        return made.train()

    ours, theirs = model(True), model(False)
    pairs = list(zip(losses(ours, 200), losses(theirs, 200), strict=True))
    assert pairs[-1][0] < pairs[0][0] - 0.15
    assert max(abs(one - other) for one, other in pairs) < 2e-6
    for number, (from_, on) in enumerate(((ours, False), (theirs, True))):
        from_.save_pretrained(tmp_path / str(number))
        loaded = PeftModel.from_pretrained(tiny_llama().double(), tmp_path / str(number)).double()
        use_fast_lora_layers(loaded, enable=on)
        batch = random_batch(0)
        expected = from_.eval()(**batch).loss
        assert torch.allclose(loaded(**batch).loss, expected, rtol=1e-10)
        assert {n: p.shape for n, p in loaded.state_dict().items()} == {
            n: p.shape for n, p in from_.state_dict().items()
        }


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_compute_the_same(make: Callable[[PeftModel], PeftModel]) -> None:
    model = get_peft_model(tiny_gpt2(), LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True))  # type: ignore[arg-type]
    use_fast_lora_layers(model)
    twin = make(model)  # type: ignore[arg-type]
    assert lora_layer_report(twin) == lora_layer_report(model)
    assert torch.equal(twin(**random_batch(0)).loss, model(**random_batch(0)).loss)
