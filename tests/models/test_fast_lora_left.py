"""What fast LoRA layers leave to PEFT: bitwise PEFT's, with the reason, and taken up again where it no longer holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lightning import seed_everything
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import LLAMA_TARGETS, random_batch, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from torch.nn.utils import parametrize

from na_lora_lightning import ImportanceOptions, discover_gates, lora_layer_report, use_fast_lora_layers
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.models.fast_lora import FastLoRALinear

SITES = [f"base_model.model.model.layers.{layer}.mlp.gate_proj" for layer in range(2)]


def llama(fast: bool = True, base: nn.Module | None = None, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 2, "target_modules": ["gate_proj"]} | options)
    model: PeftModel = get_peft_model(base or tiny_llama(), config)  # type: ignore[assignment, arg-type]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.manual_seed(len(name))
            parameter.data += 0.2 * torch.randn_like(parameter)
    use_fast_lora_layers(model, enable=fast)
    return model


def gates(model: nn.Module) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith("gate_proj")]


def hook_on_base(model: PeftModel) -> None:
    for gate in gates(model):
        gate.base_layer.register_forward_hook(lambda module, args, output: output * 2)


def hook_on_b(model: PeftModel) -> None:
    for gate in gates(model):
        gate.lora_B["default"].register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def backward_hook_on_b(model: PeftModel) -> None:
    for gate in gates(model):
        gate.lora_B["default"].register_full_backward_hook(lambda module, to, of: (to[0] * 3,))


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrised_base(model: PeftModel) -> None:
    for gate in gates(model):
        parametrize.register_parametrization(gate.base_layer, "weight", _Doubled())


def replaced_forward(model: PeftModel) -> None:
    for gate in gates(model):
        own = gate.base_layer.forward
        gate.base_layer.forward = lambda x, own=own: own(x) + 1


def two_adapters(model: PeftModel) -> None:
    torch.manual_seed(5)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["gate_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])


def merged(model: PeftModel) -> None:
    model.merge_adapter()


LEFT: dict[str, tuple[Callable[[PeftModel], None], str]] = {
    "hook on the base layer": (hook_on_base, "hooks on parts of it"),
    "hook on B": (hook_on_b, "hooks on parts of it"),
    "backward hook on B": (backward_hook_on_b, "hooks on parts of it"),
    "parametrised base layer": (parametrised_base, "its base layer is a ParametrizedLinear"),
    "replaced forward": (replaced_forward, "hooks on parts of it"),
    "two adapters": (two_adapters, "several adapters of it are active at once"),
    "merged": (merged, "no adapter of it is in use, or it is merged"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_is_bitwise_that_of_peft_and_has_a_reason(case: str) -> None:
    change, reason = LEFT[case]
    ours, theirs = llama(), llama(fast=False)
    for model in (ours, theirs):
        change(model)
    report = lora_layer_report(ours)
    assert (report.fast, dict(report.left)) == ((), {reason: tuple(SITES)})
    assert list(report.lines()) == [
        "0 of 2 LoRA layers are computed as one function each.",
        f"As PEFT computes them: {SITES[0]} and 1 more: {reason}.",
    ]
    batch = random_batch(0)
    losses = [model(**batch).loss for model in (ours, theirs)]
    assert torch.equal(*losses)
    if losses[0].requires_grad:
        for loss in losses:
            loss.backward()
        pairs = zip(ours.named_parameters(), theirs.named_parameters(), strict=True)
        for (name, one), (_, other) in pairs:
            assert one.grad is None or torch.equal(one.grad, other.grad), name  # type: ignore[arg-type]


@contextmanager
def _disabled(model: PeftModel) -> Iterator[None]:
    with model.disable_adapter():
        assert not lora_layer_report(model).fast
        yield
    assert len(lora_layer_report(model).fast) == 2


def test_adapters_are_switched_off_and_on_again() -> None:
    ours, batch = llama(), random_batch(0)
    with _disabled(ours):
        assert torch.equal(ours(**batch).loss, tiny_llama()(**batch).loss)
    plain = llama(fast=False)(**batch).loss
    assert torch.allclose(ours(**batch).loss, plain, rtol=1e-6)
    ours.merge_adapter()
    ours.unmerge_adapter()
    assert len(lora_layer_report(ours).fast) == 2
    assert torch.allclose(ours(**batch).loss, plain, rtol=1e-6)
    ours.add_adapter("second", LoraConfig(r=3, target_modules=["gate_proj"], init_lora_weights=False))
    ours.set_adapter("second")
    assert len(lora_layer_report(ours).fast) == 2
    assert not torch.allclose(ours(**batch).loss, plain, rtol=1e-4)
    merged_model = ours.merge_and_unload()
    assert not any(isinstance(module, FastLoRALinear) for module in merged_model.modules())


def test_samples_with_adapters_of_their_own_go_to_peft() -> None:
    batch = random_batch(0)
    names = ["default", "__base__", "default"]
    found = [model.eval()(**batch, adapter_names=names).loss for model in (llama(), llama(fast=False))]
    assert torch.equal(*found)


def test_switching_is_idempotent_and_reversible() -> None:
    model, batch = llama(fast=False), random_batch(0)
    theirs = model(**batch).loss
    first = use_fast_lora_layers(model)
    assert first == use_fast_lora_layers(model) == lora_layer_report(model)
    assert first.fast == tuple(SITES)
    assert [type(gate) for gate in gates(model)] == [FastLoRALinear] * 2
    assert not use_fast_lora_layers(model, enable=False).fast
    assert not any(isinstance(module, FastLoRALinear) for module in model.modules())
    assert torch.equal(model(**batch).loss, theirs)


def test_embeddings_convolutions_and_variants_have_their_reasons() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Embedding(5, 4), nn.Linear(4, 4))
    model = get_peft_model(network, LoraConfig(r=2, target_modules=["0", "1", "2"]))  # type: ignore[arg-type]
    report = use_fast_lora_layers(model)
    assert report.fast == ("base_model.model.2",)
    assert report.left == {
        "PEFT adapts it by a layer of its own, Conv1d": ("base_model.model.0",),
        "PEFT adapts it by a layer of its own, Embedding": ("base_model.model.1",),
    }
    dora = use_fast_lora_layers(llama(use_dora=True, lora_dropout=0.1))
    assert list(dora.left) == ["DoRA with dropout, where PEFT multiplies by the base layer twice"]


def test_a_layer_sharded_already_is_refused_in_one_sentence() -> None:
    model = llama(fast=False)
    gate = gates(model)[0]
    gate.__class__ = type(f"FSDP{type(gate).__name__}", (type(gate),), {})
    with pytest.raises(ConfigurationError, match="call use_fast_lora_layers before fully_shard"):
        use_fast_lora_layers(model)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.3}], ids=str)
def test_gates_statistics_and_misalignment_are_those_of_peft(options: dict[str, Any]) -> None:
    found = []
    for fast in (True, False):
        model = llama(fast, target_modules=LLAMA_TARGETS, **options).train()
        sites = discover_gates(model).require()
        controller = GateController(model, sites)
        importance = controller.set_importance(ImportanceOptions(warmup_steps=0))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        controller.attach([optimizer])
        controller.meter.enabled = True
        seed_everything(1, verbose=False)
        model(**random_batch(0)).loss.backward()
        optimizer.step()
        assert controller.misalignment is not None
        map_of_sites = [(site.name, site.lora_layer_name, site.rows.tolist(), site.kind) for site in sites]
        found.append((map_of_sites, importance.importance, *controller.misalignment))
        controller.detach()
    ours, theirs = found
    assert ours[0] == theirs[0]
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert bool((other > 0).any())
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_measuring_changes_nothing_of_what_is_computed(options: dict[str, Any]) -> None:
    losses = []
    for measured in (False, True):
        model = llama(**options)
        controller = GateController(model, discover_gates(model).require())
        controller.set_importance(ImportanceOptions(keep_fraction=1.0))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        controller.attach([optimizer])
        assert len(lora_layer_report(model).fast) == 2
        for step in range(3):
            controller.meter.enabled = measured
            loss = model(**random_batch(step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert (controller.misalignment is not None) == measured
        losses.append(loss)
        controller.detach()
    assert torch.equal(*losses)


def test_a_compiled_graph_has_the_layers_of_peft() -> None:
    batch = random_batch(0)
    torch.compiler.reset()
    compiled = torch.compile(llama(), backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(**batch).loss, llama(fast=False)(**batch).loss, rtol=1e-6)
    torch.compiler.reset()


def test_transforms_that_a_function_does_not_support_go_to_peft() -> None:
    model = get_peft_model(tiny_gpt2(), LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True))  # type: ignore[arg-type]
    use_fast_lora_layers(model)
    layer = next(module for module in model.modules() if isinstance(module, FastLoRALinear))
    x = torch.randn(3, layer.in_features)
    assert torch.allclose(torch.func.vmap(layer)(x[:, None]), layer(x)[:, None], atol=1e-6)
    x.requires_grad_(True)
    of_samples = torch.func.vmap(torch.func.grad(lambda row: layer(row[None]).square().sum()))(x)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert torch.allclose(of_samples, expected, atol=1e-5)


def test_shapes_are_known_without_numbers() -> None:
    model = llama().to("meta")
    loss = model(**{name: value.to("meta") for name, value in random_batch(0).items() if name != "attention_mask"}).loss
    loss.backward()
    assert loss.is_meta
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
