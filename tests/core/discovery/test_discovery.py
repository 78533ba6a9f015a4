"""Discovery: each found row is checked by perturbing it and watching which channel changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import (
    GATE_CHANNELS,
    GPT2_TARGETS,
    LLAMA_TARGETS,
    enable_checkpointing,
    needs_stacked_experts,
    random_batch,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    with_lora,
)
from torch import nn
from transformers import LlamaForCausalLM

from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.discovery.probe_inputs import require_probe_inputs
from na_lora_lightning.core.discovery.row_probe import probe_rows, storage_rows
from na_lora_lightning.core.model_entry import root_of
from na_lora_lightning.errors import DiscoveryError

TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def pre_activation(model: nn.Module, module: nn.Module) -> torch.Tensor:
    """The input of an activation module in one forward pass."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 5, 7]]))
    handle.remove()
    return seen[0].float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_perturbed_row_changes_exactly_its_channel(
    make_peft_model: Callable[..., PeftModel], dtype: torch.dtype
) -> None:
    model = make_peft_model().to(dtype).eval()
    gates = discover_gates(model).require()
    assert len(gates) == 2
    for site in gates:
        before = pre_activation(model, site.source.module)
        (rows,) = site.parameters()
        for channel in (0, 1, site.channels // 2, site.channels - 1):
            with torch.no_grad():
                rows.parameter[site.rows[channel]] += 1.0
            change = (pre_activation(model, site.source.module) - before).abs().amax(dim=(0, 1))
            assert torch.nonzero(change).flatten().tolist() == [channel]
            with torch.no_grad():
                rows.parameter[site.rows[channel]] -= 1.0
            before = pre_activation(model, site.source.module)


def test_a_block_as_wide_as_the_vocabulary_is_no_output_head() -> None:
    config = tiny_llama().config
    config.vocab_size = config.hidden_size
    assert len(discover_gates(with_lora(LlamaForCausalLM(config), LLAMA_TARGETS)).require()) == 2


def test_llama_sites_are_gated_and_gpt2_sites_plain() -> None:
    llama = discover_gates(with_lora(tiny_llama(), LLAMA_TARGETS))
    first = llama.sites[0]
    assert (first.name, first.kind, first.activation.name) == ("model.layers.0.mlp.act_fn", "gated", "silu")
    assert first.lora_layer_name == "model.layers.0.mlp.gate_proj"
    assert first.output_layer_name == "model.layers.0.mlp.down_proj"
    assert first.row_slice == slice(0, GATE_CHANNELS, 1)
    assert (llama.channels, llama.labels) == (2 * GATE_CHANNELS, ["layer_00", "layer_01"])

    gpt2 = discover_gates(with_lora(tiny_gpt2(), GPT2_TARGETS))
    assert [(s.kind, s.activation.name, s.lora_layer_name, s.output_layer_name) for s in gpt2] == [
        ("plain", "gelu_tanh", f"transformer.h.{i}.mlp.c_fc", f"transformer.h.{i}.mlp.c_proj") for i in range(2)
    ]


class FusedBlock(nn.Module):
    """A gated feed-forward block with one fused layer, cut in halves or interleaved."""

    def __init__(self, interleaved: bool) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(8, 24)
        self.down_proj = nn.Linear(12, 8)
        self.act = nn.SiLU()
        self.interleaved = interleaved

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fused = self.gate_up_proj(x)
        if self.interleaved:
            gate, up = fused[..., 1::2], fused[..., ::2]
        else:
            gate, up = fused.chunk(2, dim=-1)
        return self.down_proj(self.act(gate.clamp(max=7.0)) * up)


@pytest.mark.parametrize(("interleaved", "rows"), [(False, slice(0, 12, 1)), (True, slice(1, 24, 2))])
def test_fused_layers_give_the_gate_rows_alone(interleaved: bool, rows: slice) -> None:
    torch.manual_seed(0)
    model = get_peft_model(FusedBlock(interleaved), LoraConfig(r=2, target_modules=["gate_up_proj"]))
    gates = discover_gates(model, example_inputs={"x": torch.randn(1, 3, 8)}).require()
    (site,) = gates.sites
    assert site.row_slice == rows
    assert site.kind == "gated"


@settings(max_examples=40)
@given(
    channels=st.integers(1, 300),
    extra=st.integers(0, 40),
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_probe_inverts_any_selection_of_rows(channels: int, extra: int, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(channels + extra, generator=generator)[:channels]
    lora_b = torch.zeros(channels + extra, 3, dtype=dtype, requires_grad=True)
    inner = torch.randn(5, 3, generator=generator).to(dtype)
    z = (inner @ lora_b.T)[..., rows] * 0.5
    found = probe_rows(z, lora_b)
    assert found is not None
    assert torch.equal(found, rows)


def test_probe_refuses_what_is_not_one_to_one() -> None:
    lora_b = torch.zeros(6, 2, requires_grad=True)
    output = torch.randn(4, 2) @ lora_b.T
    assert probe_rows(output[..., :3] + output[..., 3:], lora_b) is None
    assert probe_rows(output.cumsum(-1), lora_b) is None


def test_storage_match_sees_views_and_refuses_copies() -> None:
    output = torch.randn(2, 3, 8)
    assert storage_rows(output[..., 4:], output).tolist() == [4, 5, 6, 7]  # type: ignore[union-attr]
    assert storage_rows(output[..., 1::2], output).tolist() == [1, 3, 5, 7]  # type: ignore[union-attr]
    assert storage_rows(output.clone(), output) is None


def test_discovery_leaves_the_model_as_it_was(make_peft_model: Callable[..., PeftModel]) -> None:
    model = make_peft_model(lora_dropout=0.5)
    root_of(model).get_submodule("model.layers.0" if hasattr(root_of(model), "model") else "transformer.h.0").eval()
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    discover_gates(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_lora_on_gates_names_them_and_the_remedy() -> None:
    gates = discover_gates(with_lora(tiny_llama(), ["q_proj", "up_proj"]))
    with pytest.raises(DiscoveryError, match=r"none of the model's 2 gates has LoRA .*act_fn.*add 'gate_proj'"):
        gates.require()


def test_some_gates_without_lora_are_an_error_unless_allowed() -> None:
    gates = discover_gates(with_lora(tiny_llama(), ["gate_proj"], layers_to_transform=[1]))
    with pytest.raises(DiscoveryError, match=r"1 of 2 gates have no LoRA \(model\.layers\.0\.mlp\.act_fn\)"):
        gates.require()
    assert len(gates.require(allow_unmasked_gates=True)) == 1


def test_a_model_without_gates_is_refused() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    model = get_peft_model(Plain(), LoraConfig(r=2, target_modules=["first"]))
    with pytest.raises(DiscoveryError, match="no feed-forward gate was found"):
        discover_gates(model, {"x": torch.randn(1, 4)}).require()
    with pytest.raises(DiscoveryError, match="pass example_inputs"):
        require_probe_inputs(root_of(model))


def test_a_model_without_lora_is_refused() -> None:
    with pytest.raises(DiscoveryError, match="LlamaForCausalLM holds no LoRA layer"):
        discover_gates(tiny_llama())


def test_one_activation_shared_by_two_layers_is_a_site_for_each() -> None:
    llama = tiny_llama()
    llama.model.layers[1].mlp.act_fn = llama.model.layers[0].mlp.act_fn
    gates = discover_gates(with_lora(llama, LLAMA_TARGETS)).require()
    assert [site.lora_layer_name for site in gates] == [f"model.layers.{i}.mlp.gate_proj" for i in range(2)]
    assert [site.calls for site in gates] == [frozenset({0}), frozenset({1})]
    assert gates.labels == ["layer_00", "layer_01"]


def test_stacked_experts_without_lora_are_named_with_their_parameters() -> None:
    gates = discover_gates(with_lora(tiny_mixtral(), ["q_proj"]))
    with pytest.raises(DiscoveryError, match=r"2 gates has LoRA .*add 'gate_up_proj' to the LoRA target parameters"):
        gates.require()


class ForEachExpert(nn.Module):
    """A mixture of experts as a list, which calls only the experts that some token is routed to."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([PlainBlock(nn.ReLU()), PlainBlock(nn.SiLU()), PlainBlock(nn.GELU())])

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return self.experts[expert](x)


class PlainBlock(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.up_proj, self.act, self.down_proj = nn.Linear(8, 12), activation, nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.up_proj(x)))


def test_an_expert_that_the_probe_did_not_reach_is_named() -> None:
    model = get_peft_model(ForEachExpert(), LoraConfig(r=2, target_modules=["up_proj"]))
    gates = discover_gates(model, {"x": torch.randn(1, 3, 8), "expert": 1})
    assert [site.name for site in gates] == ["experts.1.act"]
    with pytest.raises(DiscoveryError, match=r"experts\.0\.act, experts\.2\.act.*pass example_inputs that reach every"):
        gates.require()
    assert len(gates.require(allow_unmasked_gates=True)) == 1


def test_discovery_runs_beside_gradient_checkpointing() -> None:
    model = with_lora(tiny_llama(), LLAMA_TARGETS)
    enable_checkpointing(model)
    assert len(discover_gates(model)) == 2
    model(**random_batch(0)).loss.backward()


@pytest.mark.parametrize("experts", [False, pytest.param(True, marks=needs_stacked_experts)])
def test_of_several_adapters_the_active_one_counts(experts: bool) -> None:
    targets = {"target_modules": [] if experts else ["gate_proj"]}
    if experts:
        targets["target_parameters"] = TARGETS
    base = tiny_mixtral() if experts else tiny_llama()
    model = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", **targets))  # type: ignore[arg-type]
    model.add_adapter("second", LoraConfig(r=3, task_type="CAUSAL_LM", **targets))  # type: ignore[arg-type]
    for active in ("second", "default"):
        model.set_adapter(active)
        gates = discover_gates(model).require(allow_unmasked_gates=True)
        for site in gates:
            assert site.adapters == [active]
            (rows,) = site.parameters()
            assert f".lora_B.{active}." in rows.name
            assert rows.parameter.shape[1] == {"default": 2, "second": 3}[active] * site.networks


def test_two_active_adapters_are_masked_together() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["gate_proj"]))
    model.add_adapter("second", LoraConfig(r=3, task_type="CAUSAL_LM", target_modules=["gate_proj"]))
    model.base_model.set_adapter(["default", "second"])
    gates = discover_gates(model).require()
    assert [[tuple(rows.parameter.shape) for rows in site.parameters()] for site in gates] == [
        [(GATE_CHANNELS, 2), (GATE_CHANNELS, 3)]
    ] * 2
