"""Statistics and updates of stacked experts, against a computation expert by expert from the weights alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import PLAIN_IMPORTANCE, random_batch, tiny_mixtral, with_lora
from torch import nn
from transformers import Llama4ForCausalLM, Llama4TextConfig
from zoo.tiny_models import build

from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery import expert_gates
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.experts import expert_owners, stacked_parameters
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.core.pre_activations import GateMethod
from na_lora_lightning.core.sites import GateSite
from na_lora_lightning.errors import ConfigurationError, DataError, DiscoveryError
from na_lora_lightning.models.targets import lora_targets

TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def moe(implementation: str = "grouped_mm") -> PeftModel:
    model = tiny_mixtral()
    model.config._experts_implementation = implementation
    return with_lora(model, [], target_parameters=TARGETS)


def seen_by_experts(model: PeftModel, site: GateSite, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Pre-activations of the real tokens of each expert, ``[tokens, channels]``, from inputs, routing and weights."""
    assert site.experts is not None
    given: dict[str, torch.Tensor] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given["hidden"] = args[0].detach()
        given["routing"] = args[1] if len(args) > 1 else torch.empty(0)

    handle = site.experts.owner.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(**batch)
    handle.remove()
    real = batch["attention_mask"].flatten().bool()
    layer, experts = site.lora_layer, site.experts.count
    (adapter,) = site.adapters
    matrix_a, matrix_b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    rank = matrix_a.shape[0] // experts
    found = []
    for expert in range(experts):
        base = stacked_parameters(site.experts.owner)[layer.parameter_name][expert]
        own_a = matrix_a[expert * rank : (expert + 1) * rank]
        change = layer.scaling[adapter] * matrix_b[:, expert::experts] @ own_a
        weight = (base.T if getattr(site.experts.owner, "is_transposed", False) else base) + change
        if given["routing"].numel():
            hidden = given["hidden"][(given["routing"] == expert).any(dim=1) & real]
        else:
            hidden = given["hidden"].view(experts, -1, given["hidden"].shape[-1])[expert]
            hidden = hidden[(hidden != 0).any(dim=1) & real]
        found.append((hidden @ weight.T).detach()[:, site.rows])
    return found


def llama4() -> PeftModel:
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, intermediate_size_mlp=20, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    model = Llama4ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "experts." in name:
            nn.init.normal_(parameter, std=0.3)
    targets = lora_targets(model, ["gate_proj", "up_proj"], "all-experts")
    return with_lora(model, targets.target_modules or [], target_parameters=targets.target_parameters)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager", "llama4"])
@pytest.mark.parametrize("padded", [False, True])
def test_responsiveness_is_that_of_each_expert_over_its_real_tokens(implementation: str, padded: bool) -> None:
    model = llama4() if implementation == "llama4" else moe(implementation)
    gates = discover_gates(model).require(allow_unmasked_gates=True)
    controller = GateController(model, gates, ObserverOptions(max_tokens=None))
    options = ImportanceOptions(**PLAIN_IMPORTANCE, warmup_steps=0, beta=0.0, refresh_every=1)
    importance = controller.set_importance(options)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    batch = random_batch(3, batch=4, padded=padded)
    controller.attach([optimizer])
    model(**batch).loss.backward()
    optimizer.step()
    controller.detach()
    expected_weights = []
    sites = [site for site in gates if site.experts is not None]
    assert len(sites) == 2
    for site in sites:
        index = gates.sites.index(site)
        found = importance.responsiveness[importance.layout.site_slices[index]].view(4, site.channels)
        weights = importance.weights[importance.layout.site_slices[index]].view(4, site.channels)
        for expert, z in enumerate(seen_by_experts(model, site, batch)):
            if not len(z):
                assert torch.equal(weights[expert], torch.ones(site.channels))
                continue
            slope = torch.sigmoid(z) * torch.sigmoid(-z)
            torch.testing.assert_close(found[expert], slope.mean(dim=0), rtol=1e-4, atol=1e-6)
            kept = slope.mean(dim=0).argsort(descending=True)[: site.channels // 2]
            expected_weights.append(weights[expert].nonzero().flatten().tolist() == sorted(kept.tolist()))
    assert all(expected_weights)
    assert len(expected_weights) >= 6


def test_only_the_kept_channels_of_an_expert_move_and_only_in_its_own_columns() -> None:
    model = moe()
    gates = discover_gates(model).require()
    controller = GateController(model, gates)
    importance = controller.set_importance(ImportanceOptions(keep_fraction=0.5, warmup_steps=0, refresh_every=1))
    controller.set_step_scale(StepScaleOptions(granularity="site", normalize=False))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    controller.attach([optimizer])
    twin = moe()
    plain = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    before = [site.parameters()[0].parameter.detach().clone() for site in gates]
    for network, loop in ((model, optimizer), (twin, plain)):
        network(**random_batch(0, batch=6)).loss.backward()
        loop.step()
    for index, (site, twin_site) in enumerate(zip(gates, discover_gates(twin), strict=True)):
        after, vanilla = site.parameters()[0].parameter, twin_site.parameters()[0].parameter
        weights = controller.weights[importance.layout.site_slices[index]].view(4, site.channels)
        assert 0.3 < float((weights == 0).float().mean()) < 0.6
        for expert in range(4):
            columns = slice(expert, None, 4)
            own = weights[expert][:, None]
            start, end = before[index][site.rows][:, columns], vanilla[site.rows][:, columns]
            torch.testing.assert_close(after[site.rows][:, columns], start + own * (end - start), rtol=1e-5, atol=1e-7)
            still = weights[expert] == 0
            assert torch.equal(after[site.rows][still][:, columns], start[still])
        # The up rows of the fused parameter are nobody's gate.
        assert torch.equal(after[site.channels :], vanilla[site.channels :])
    controller.detach()


def test_sampled_tokens_give_the_same_as_all_when_there_are_no_more() -> None:
    found = []
    for limit in (None, 200, 9):
        model = moe()
        gates = discover_gates(model).require()
        controller = GateController(model, gates, ObserverOptions(max_tokens=limit))
        importance = controller.set_importance(ImportanceOptions(criterion="selection_derivative", warmup_steps=0))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        controller.attach([optimizer])
        model(**random_batch(1, batch=6)).loss.backward()
        optimizer.step()
        found.append(importance.responsiveness)
    assert torch.equal(found[0], found[1])
    assert 0.0 < float((found[0] - found[2]).abs().max()) < 0.25


def test_interleaved_experts_with_a_functional_activation() -> None:
    tiny = build("causal-lm", "gpt_oss")
    targets = lora_targets(tiny.model, ["q_proj"], "all-experts")
    lora = LoraConfig(r=4, target_modules=targets.target_modules, target_parameters=targets.target_parameters)
    gates = discover_gates(get_peft_model(tiny.model, lora)).require()
    assert {site.activation.name for site in gates} == {"quick_gelu"}
    assert {str(site.row_slice) for site in gates} == {str(slice(0, 2 * gates.sites[0].channels - 1, 2))}
    for site in gates:
        assert isinstance(site.source, GateMethod)
        assert site.source.channels.highest == pytest.approx(7.0, abs=1e-3)


def test_masking_the_gradient_of_a_is_refused() -> None:
    model = moe()
    controller = GateController(model, discover_gates(model).require())
    with pytest.raises(ConfigurationError, match=r"mask_gradient_to_a does not work for .*experts"):
        controller.set_importance(ImportanceOptions(mask_gradient_to_a=True))


def test_padding_that_does_not_fit_the_tokens_is_refused() -> None:
    model = moe()
    gates = discover_gates(model).require()
    controller = GateController(model, gates)
    controller.set_importance(ImportanceOptions())
    controller.attach([torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)])
    hidden, routing = torch.randn(5, 16), torch.zeros(5, 2, dtype=torch.int64)
    routing[:, 1] = 1
    controller.observer._begin(model.get_base_model(), (), {"attention_mask": torch.ones(2, 3)})
    with pytest.raises(DataError, match="padding mask of shape"):
        gates.sites[0].experts.owner(hidden, routing, torch.ones(5, 2))  # type: ignore[union-attr]
    controller.detach()


@pytest.mark.parametrize("model_type", ["recurrent_gemma", "xlnet", "zamba", "reformer", "mamba2", "jetmoe", "dbrx"])
def test_three_dimensional_parameters_that_are_no_experts(model_type: str) -> None:
    assert not list(expert_owners(build("causal-lm", model_type).model))


@pytest.mark.parametrize(
    ("installed", "newer"), [("0.18.1", True), ("0.19.0", True), ("0.19.1", False), ("1.0", False)]
)
def test_another_layout_of_an_older_peft_is_named_with_its_version(
    installed: str, newer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_gates, "version", {"peft": installed}.__getitem__)
    monkeypatch.setattr(expert_gates, "_map", lambda *_: None)
    model = with_lora(tiny_mixtral(), ["q_proj"], target_parameters=["gate_up_proj", "down_proj"])
    with pytest.raises(
        DiscoveryError, match=r"do not correspond to rows and columns of lora_B of .*gate_up_proj"
    ) as told:
        discover_gates(model).require()
    assert (f"; upgrade peft {installed} to 0.19.1 or newer, which has" in str(told.value)) is newer
    assert str(told.value).endswith("take these layers out of the LoRA targets.")
