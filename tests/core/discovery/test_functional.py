"""Functional gates on code whose gate is known, and a dozen model families whose rows are perturbed to check them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_models import random_batch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from na_lora_lightning.core.activations import ElementwiseActivation
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.functional_probe import identify, keeps_tokens_apart
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.in_force import describe
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions

LIKE = torch.zeros(3, 12)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (functional.silu, "silu"),
        (functional.gelu, "gelu"),
        (lambda z: functional.gelu(z, approximate="tanh"), "gelu_tanh"),
        (lambda z: z * torch.sigmoid(1.702 * z), "quick_gelu"),
        (torch.relu, "relu"),
        (lambda z: torch.relu(z).square(), "relu_squared"),
        (lambda z: z * torch.sigmoid(0.5 * z), "sigmoid_gated_0.5"),
    ],
)
@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_known_activations_are_told_up_to_a_factor(function: object, name: str, factor: float) -> None:
    found = identify(lambda output: factor * function(output), LIKE)  # type: ignore[operator]
    assert found is not None
    assert found.activation is not None
    assert (found.activation.name, found.kind, found.is_self_gated) == (name, "plain", True)
    assert (found.channels.lowest, found.channels.highest) == (None, None)
    assert found.channels.features.tolist() == list(range(12))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    highest=st.none() | st.floats(2.5, 30.0),
    lowest=st.none() | st.floats(-11.0, -2.5),
    offset=st.sampled_from([0.0, 1.0]),
)
def test_gate_features_and_clamp_of_a_fused_layer(
    seed: int, highest: float | None, lowest: float | None, offset: float
) -> None:
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    gate_features, other_features = order[:6], order[6:]

    def answer(output: Tensor) -> Tensor:
        gate, other = output[..., gate_features], output[..., other_features].clamp(-7.0, 7.0)
        if highest is not None or lowest is not None:
            gate = gate.clamp(lowest, highest)
        return functional.silu(gate) * (other + offset)

    found = identify(answer, LIKE)
    assert found is not None
    assert found.activation is not None
    assert (found.activation.name, found.kind) == ("silu", "gated")
    assert torch.equal(found.channels.features, gate_features)
    for got, wanted in ((found.channels.lowest, lowest), (found.channels.highest, highest)):
        assert got == (None if wanted is None else pytest.approx(wanted, rel=2e-2))


def test_what_is_no_gate() -> None:
    assert identify(lambda output: 3.0 * output + 1.0, LIKE) is None
    assert identify(lambda output: functional.layer_norm(output, (12,)), LIKE) is None
    assert identify(lambda output: torch.softmax(output, dim=-1), LIKE) is None
    assert identify(lambda output: output[..., :6] * output[..., 6:], LIKE) is None


def test_a_function_that_is_not_self_gated_is_said_to_be_none() -> None:
    for function in (torch.sigmoid, torch.tanh, torch.exp):
        found = identify(function, LIKE)
        assert found is not None
        assert (found.activation, found.is_self_gated) == (None, False)


def test_an_unknown_self_gated_function_can_be_used_as_a_function() -> None:
    def answer(output: Tensor) -> Tensor:
        gate, other = output.chunk(2, dim=-1)
        return 4.0 * torch.tanh(gate / 4.0) * torch.sigmoid(gate) * 10.0 * torch.tanh(other / 10.0)

    found = identify(answer, LIKE)
    assert found is not None
    assert found.activation is None
    assert found.channels.features.tolist() == list(range(6))
    activation = ElementwiseActivation("capped", found.function_of(answer))
    z = torch.linspace(-5.0, 5.0, 41)
    expected = 4.0 * torch.tanh(z / 4.0) * torch.sigmoid(z)
    values = activation.evaluate(z)
    torch.testing.assert_close(values.output / values.output[-1], expected / expected[-1], rtol=1e-5, atol=1e-6)
    slope = torch.autograd.functional.jacobian(lambda x: (4.0 * torch.tanh(x / 4.0) * torch.sigmoid(x)).sum(), z)
    torch.testing.assert_close(values.output_derivative / values.output[-1], slope / expected[-1], rtol=1e-4, atol=1e-5)


def test_a_function_that_may_be_a_gate_is_in_the_line_at_the_start() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4)
            self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.down(self.act(self.up(x)))
            z = self.fc1(x)
            return x + self.fc2(torch.where(z > 0, z, 0.1 * z))

    network: Any = Network()
    model = get_peft_model(network, LoraConfig(r=2, target_modules=["up", "fc1"]))
    gates = discover_gates(model, {"x": torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))}).require()
    assert [entry.reason for entry in gates.left_out] == ["the function between fc1 and fc2 is of no known form"]
    controller = GateController(model, gates)
    controller.set_importance(ImportanceOptions())
    line = describe(gates, controller.mechanisms)
    assert "1 silu gate, 6 channels (1 function of unknown form behind LoRA: plain LoRA); " in line


SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("model_type", "options", "activation", "kind", "layer"),
    [
        ("phi3", {}, "silu", "gated", "gate_up_proj"),
        ("glm", {}, "silu", "gated", "gate_up_proj"),
        ("gemma2", {}, "gelu_tanh", "gated", "gate_proj"),
        ("gemma3_text", {}, "gelu_tanh", "gated", "gate_proj"),
        ("qwen3", {}, "silu", "gated", "gate_proj"),
        ("mistral", {}, "silu", "gated", "gate_proj"),
        ("gpt_neox", {}, "gelu", "plain", "dense_h_to_4h"),
        ("phi", {}, "gelu_tanh", "plain", "fc1"),
        ("opt", {"ffn_dim": 24, "word_embed_proj_dim": 16}, "relu", "plain", "fc1"),
        ("nemotron", {}, "relu_squared", "plain", "up_proj"),
        ("bloom", {"n_layer": 2, "n_head": 2}, "gelu_tanh", "plain", "dense_h_to_4h"),
        ("mpt", {"d_model": 16, "n_heads": 2, "n_layers": 2}, "gelu", "plain", "up_proj"),
    ],
)
def test_every_row_makes_exactly_its_channel(
    model_type: str, options: dict[str, Any], activation: str, kind: str, layer: str
) -> None:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SMALL, **options}))
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    gates = discover_gates(model).require()
    assert len(gates) == 2
    batch = random_batch(0, padded=False)
    del batch["labels"]

    def pre_activations() -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        hooks = [site.source.watch(lambda z: seen.append(z.clone())) for site in gates]
        with torch.no_grad():
            model(**batch)
        for hook in hooks:
            hook.remove()
        return seen

    for index, site in enumerate(gates):
        assert (site.activation.name, site.kind, site.lora_layer_name.rsplit(".", 1)[-1]) == (activation, kind, layer)
        (rows,) = site.parameters()
        before = pre_activations()[index]
        assert before.shape[-1] == site.channels
        for channel in range(site.channels):
            with torch.no_grad():
                rows.parameter[site.rows[channel]] += 1.0
            change = (pre_activations()[index] - before).abs().flatten(0, -2).amax(dim=0)
            with torch.no_grad():
                rows.parameter[site.rows[channel]] -= 1.0
            assert torch.nonzero(change > 1e-3 * change.max()).flatten().tolist() == [channel]


@pytest.mark.parametrize(
    ("code", "apart"),
    [
        (lambda z: functional.silu(z).softmax(-1), True),
        (lambda z: functional.layer_norm(z, z.shape[-1:]), True),
        (lambda z: z.cumsum(1), False),
        (lambda z: z - z.mean(dim=(0, 1), keepdim=True), False),
    ],
)
def test_tokens_that_see_others_are_told(code: Any, apart: bool) -> None:
    assert keeps_tokens_apart(code, torch.zeros(2, 3, 12)) is apart
