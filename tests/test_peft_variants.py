"""Variants of LoRA in PEFT: whatever has a row for each channel follows the mask; other methods are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import reference
import torch
from lightning_models import ForeignModule, loader, make_trainer
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from tiny_models import (
    GPT2_TARGETS,
    LLAMA_TARGETS,
    PLAIN_IMPORTANCE,
    PLAIN_SCALE,
    enable_checkpointing,
    random_batch,
    tiny_gpt2,
    tiny_llama,
    with_lora,
)
from torch import Tensor, nn

from na_lora_lightning import GateImportanceCallback, StepScaleCallback
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.errors import ConfigurationError, DiscoveryError, UpdateError

# A Llama's linear layers have no bias; nothing is merged here.
pytestmark = pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")

ALL_TOKENS = ObserverOptions(max_tokens=None)
INVOCATION = 3


def llama(**options: Any) -> PeftModel:
    return with_lora(tiny_llama(), LLAMA_TARGETS, **options)


def gpt2(**options: Any) -> PeftModel:
    return with_lora(tiny_gpt2(), GPT2_TARGETS, **options)


def adalora() -> PeftModel:
    config = AdaLoraConfig(
        target_modules=LLAMA_TARGETS, total_step=20, tinit=1, tfinal=5, init_r=4, target_r=2, task_type="CAUSAL_LM"
    )
    model = get_peft_model(tiny_llama(), config)
    for name, parameter in model.named_parameters():
        if "lora_E" in name:
            nn.init.normal_(parameter)
    return model.train()


def eva() -> PeftModel:
    # Ranks stay: where EVA gives a gate none, it takes the LoRA layer away.
    config = LoraConfig(
        r=4,
        target_modules=LLAMA_TARGETS,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(tiny_llama(), config, low_cpu_mem_usage=True)
    peft.initialize_lora_eva_weights(model, [random_batch(i, padded=False) for i in range(4)], show_progress_bar=False)
    return model.train()


VARIANTS: dict[str, Callable[[], PeftModel]] = {
    "rslora": lambda: llama(use_rslora=True),
    "dora": lambda: llama(use_dora=True),
    "dora_of_conv1d": lambda: gpt2(use_dora=True),
    "pissa": lambda: llama(init_lora_weights="pissa"),
    "pissa_niter": lambda: llama(init_lora_weights="pissa_niter_4"),
    "olora": lambda: llama(init_lora_weights="olora"),
    "orthogonal": lambda: llama(init_lora_weights="orthogonal"),
    "gaussian": lambda: llama(init_lora_weights="gaussian"),
    "eva": eva,
    "patterns": lambda: llama(
        rank_pattern={"gate_proj": 2, "layers.1.mlp.gate_proj": 8}, alpha_pattern={"gate_proj": 3}
    ),
    "modules_to_save": lambda: llama(modules_to_save=["lm_head", "embed_tokens"]),
    "trainable_tokens": lambda: llama(trainable_token_indices=[4, 5]),
    "bias_lora_only": lambda: gpt2(bias="lora_only"),
    "bias_all": lambda: gpt2(bias="all"),
    "lora_bias": lambda: llama(lora_bias=True),
    "lora_bias_of_conv1d": lambda: gpt2(lora_bias=True),
    "layer_replication": lambda: llama(layer_replication=[[0, 2], [1, 2]]),
    "alora": lambda: llama(alora_invocation_tokens=[INVOCATION]),
    "adalora": adalora,
    "bdlora": lambda: llama(
        use_bdlora=peft.tuners.lora.config.BdLoraConfig(
            target_modules_bd_a=[], target_modules_bd_b=["gate_proj", "up_proj"], nblocks=2, match_strict=False
        )
    ),
    "velora": lambda: llama(velora_config=peft.tuners.lora.config.VeloraConfig()),
    "kasa": lambda: llama(kasa_config=peft.tuners.lora.config.KasaConfig()),
}


def batch_of(step: int) -> dict[str, Tensor]:
    batch = random_batch(step)
    # Where aLoRA's adapter begins.
    batch["input_ids"][:, 1] = INVOCATION
    return batch


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def controlled(
    model: PeftModel, optimizer: torch.optim.Optimizer, matrix_a_factor: float = 1.0, **options: Any
) -> GateController:
    controller = GateController(model, discover_gates(model).require(), ALL_TOKENS)
    controller.set_importance(
        ImportanceOptions(**{**PLAIN_IMPORTANCE, "warmup_steps": 0, "refresh_every": 1, **options})
    )
    controller.set_step_scale(StepScaleOptions(**{**PLAIN_SCALE, "matrix_a_factor": matrix_a_factor}))
    controller.attach([optimizer])
    controller.meter.enabled = True
    return controller


def twin_of(make: Callable[[], PeftModel]) -> PeftModel:
    torch.manual_seed(0)
    model = make()
    for name, parameter in model.named_parameters():
        if "post_attention_layernorm" in name or "ln_2.weight" in name:
            # Pre-activations of a few units, so that there are several regimes.
            parameter.data *= 20.0
    return model


@pytest.mark.parametrize("name", VARIANTS)
def test_everything_with_a_row_for_each_channel_follows_mask_and_scale(name: str) -> None:
    # SGD, whose twin takes the same step from the same gradients.
    model, twin = twin_of(VARIANTS[name]), twin_of(VARIANTS[name])
    optimizer = torch.optim.SGD(trained(model), lr=1.0, weight_decay=0.1)
    plain = torch.optim.SGD(trained(twin), lr=1.0, weight_decay=0.1)
    controller = controlled(model, optimizer, matrix_a_factor=0.25)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    others = dict(twin.named_parameters())
    seen: list[list[Tensor]] = [[] for _ in controller.gates]
    real = batch_of(0)["attention_mask"].bool()
    for site, kept in zip(controller.gates, seen, strict=True):
        site.source.module.register_forward_pre_hook(lambda m, args, to=kept: to.append(args[0].detach()[real]))
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    for each, one in ((model, optimizer), (twin, plain)):
        # MonteCLoRA and dropout aside, nothing is drawn.
        each(**batch_of(0)).loss.backward()
        one.step()
    corrected = set()
    for site, kept, weights in zip(
        controller.gates, seen, controller.weights.split([site.channels for site in controller.gates]), strict=True
    ):
        assert controller.importance is not None
        columns = controller.layout.site_slices[controller.gates.sites.index(site)]
        expected = reference.responsiveness("selection_derivative", site.activation.name, kept[0].tolist())
        assert controller.importance.responsiveness[columns].tolist() == pytest.approx(expected, rel=1e-5)
        eta = float(weights.max())
        assert weights.tolist() == [eta * m for m in reference.top_k(expected, 0.5)]
        assert 0 < eta < 1
        for entry in site.parameters():
            key = names[id(entry.parameter)]
            corrected.add(key)
            old, own, plain_rows = (
                value.detach()[site.rows].reshape(site.channels, -1)
                for value in (before[key], entry.parameter, others[key])
            )
            blended = torch.tensor(reference.update_rows(old.tolist(), plain_rows.tolist(), weights.tolist()))
            assert torch.allclose(own, blended, atol=1e-6), key
            assert torch.equal(own[weights == 0], old[weights == 0]), key
        assert site.matrices_a()
        for entry in site.matrices_a():
            key = names[id(entry.parameter)]
            corrected.add(key)
            assert not torch.equal(others[key], before[key])
            assert torch.equal(entry.parameter, torch.lerp(before[key], others[key].detach(), 0.25)), key
    for key, parameter in model.named_parameters():
        if key not in corrected:
            assert torch.equal(parameter, others[key]), key
    kinds = {key.split(".")[-3] if "lora_" in key else key.split(".")[-2] for key in corrected if "lora_A" not in key}
    assert kinds == {
        "dora": {"lora_B", "lora_magnitude_vector"},
        "dora_of_conv1d": {"lora_B", "lora_magnitude_vector"},
        "bias_lora_only": {"lora_B", "base_layer"},
        "bias_all": {"lora_B", "base_layer"},
        "adalora": {"gate_proj"},
    }.get(name, {"lora_B"})


def keeper(kept: dict[str, list[Tensor]], key: str, real: Tensor) -> Callable[..., None]:
    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        # A copy, as AdaLoRA adds to its base layer's output in place.
        kept.setdefault(key, []).append(output.detach().clone()[real])

    return keep


def test_the_scaling_of_each_variant_is_in_the_misalignment() -> None:
    measured = {}
    for name in ("rslora", "patterns", "dora", "lora_bias", "adalora", "alora", "pissa"):
        model = twin_of(VARIANTS[name])
        optimizer = torch.optim.SGD(trained(model), lr=0.0)
        controller = controlled(model, optimizer)
        kept: dict[str, list[Tensor]] = {}
        site, batch = controller.gates.sites[0], batch_of(0)
        real = batch["attention_mask"].bool()
        for key, module in (("base", site.lora_layer.base_layer), ("moved", site.lora_layer)):
            module.register_forward_hook(keeper(kept, key, real))  # type: ignore[union-attr]
        model(**batch).loss.backward()
        optimizer.step()
        assert controller.misalignment is not None
        expected = (torch.sigmoid(kept["moved"][0]) - torch.sigmoid(kept["base"][0])).abs().mean()
        assert float(controller.misalignment[0][0]) == pytest.approx(float(expected), rel=1e-3, abs=1e-7), name
        measured[name] = float(expected)
    assert all(value > 1e-4 for value in measured.values()), measured


def test_an_initialisation_that_moves_the_base_starts_misaligned_and_responds_as_the_pretrained_layer() -> None:
    # B = 0 starts from no change. PiSSA leaves the layer's output as it was, and so the responsiveness, but splits it.
    found = {}
    for name in (True, "pissa"):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=LLAMA_TARGETS, init_lora_weights=name, task_type="CAUSAL_LM")
        model = get_peft_model(tiny_llama(), config).train()
        optimizer = torch.optim.SGD(trained(model), lr=0.0)
        controller = controlled(model, optimizer)
        model(**batch_of(0)).loss.backward()
        optimizer.step()
        assert controller.misalignment is not None
        assert controller.importance is not None
        found[name] = (controller.misalignment[0], controller.importance.responsiveness)
    assert found[True][0].tolist() == [0.0, 0.0]
    assert bool((found["pissa"][0] > 1e-3).all())
    assert torch.allclose(found[True][1], found["pissa"][1], atol=1e-6)


def test_adalora_changes_its_ranks_under_the_mask(tmp_path: Path) -> None:
    class Ranked(ForeignModule):
        def on_train_batch_end(self, *args: Any) -> None:
            self.model.base_model.update_and_allocate(self.global_step)

    module = Ranked()
    module.network["language"] = adalora()
    importance = GateImportanceCallback(keep_fraction=0.5, warmup_steps=0, refresh_every=100, observer=ALL_TOKENS)
    layer = module.model.base_model.model.model.layers[0].mlp.gate_proj
    before = layer.lora_B["default"].detach().clone()
    make_trainer(tmp_path, callbacks=[importance, StepScaleCallback(observer=ALL_TOKENS)]).fit(module, loader())
    weights = importance.controller.importance.weights[:24]  # type: ignore[union-attr]
    moved = (layer.lora_B["default"] != before).any(dim=1)
    assert torch.equal(moved, weights > 0)
    assert int((layer.lora_E["default"] == 0).sum()) > 0


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_gradient_of_a_is_masked_with_dora_too(use_dora: bool) -> None:
    model = llama(use_dora=use_dora)
    optimizer = torch.optim.SGD(trained(model), lr=0.0)
    controller = controlled(model, optimizer, mask_gradient_to_a=True)
    model(**batch_of(0)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model(**batch_of(0)).loss.backward()
    assert controller.importance is not None
    layers: list[Any] = [site.lora_layer for site in controller.gates]
    found = [layer.lora_A["default"].weight.grad.clone() for layer in layers]
    for layer, masked, mask in zip(layers, found, controller.importance.weights.split(24), strict=True):
        cotangents: list[Tensor] = []
        inputs: list[Tensor] = []
        handles = [
            layer.lora_B["default"].register_full_backward_hook(lambda m, i, o, to=cotangents: to.append(o[0])),
            layer.lora_A["default"].register_forward_pre_hook(lambda m, args, to=inputs: to.append(args[0])),
        ]
        model(**batch_of(0)).loss.backward()
        by_hand = ((cotangents[0] * mask) @ layer.lora_B["default"].weight).flatten(0, 1).T @ inputs[-1].flatten(0, 1)
        assert torch.allclose(masked, by_hand, atol=1e-6)
        for handle in handles:
            handle.remove()


def test_the_gradient_of_a_cannot_be_masked_in_other_variants() -> None:
    for make in (adalora, VARIANTS["kasa"]):
        model = make()
        with pytest.raises(ConfigurationError, match=r"mask_gradient_to_a does not work for .* product of two"):
            controlled(model, torch.optim.SGD(trained(model), lr=0.1), mask_gradient_to_a=True)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["rslora", "dora", "lora_bias", "adalora"])
def test_lora_trains_under_gradient_checkpointing(name: str, use_reentrant: bool) -> None:
    plain, checkpointed = twin_of(VARIANTS[name]), twin_of(VARIANTS[name])
    enable_checkpointing(checkpointed, use_reentrant)
    found = []
    for model in (plain, checkpointed):
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        controller = controlled(model, optimizer)
        for step in range(2):
            optimizer.zero_grad()
            model(**batch_of(step)).loss.backward()
            for key, parameter in model.named_parameters():
                if parameter.requires_grad and ("lora_A" in key or "lora_B" in key):
                    assert parameter.grad is not None, key
                    assert bool(parameter.grad.any()), key
            optimizer.step()
        found.append((controller.importance.importance, model.state_dict()))  # type: ignore[union-attr]
    assert torch.equal(found[0][0], found[1][0])
    for key, value in found[0][1].items():
        assert torch.equal(value, found[1][1][key]), key


# ---- several adapters ----


def test_only_the_active_adapter_counts_and_switching_it_is_refused(tmp_path: Path) -> None:
    class Switching(ForeignModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                self.model.set_adapter("second")

    module = Switching()
    module.model.add_adapter("second", LoraConfig(r=2, target_modules=LLAMA_TARGETS, task_type="CAUSAL_LM"))
    module.model.set_adapter("default")
    importance = GateImportanceCallback(keep_fraction=0.5, warmup_steps=0, refresh_every=1)
    second = {key: value.clone() for key, value in module.state_dict().items() if ".second." in key}
    with pytest.raises(UpdateError, match=r"were \['default'\] when training began and are \['second'\] now"):
        make_trainer(tmp_path, callbacks=[importance]).fit(module, loader())
    assert importance.controller.importance.steps == 2  # type: ignore[union-attr]
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in second.items())


def test_two_active_adapters_share_the_mask_of_their_sum() -> None:
    model = llama()
    model.add_adapter("second", LoraConfig(r=2, target_modules=LLAMA_TARGETS, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    controller = controlled(model, optimizer)
    (first, second), before = controller.gates.sites[0].parameters(), {}
    for entry in (first, second):
        before[entry.name] = entry.parameter.detach().clone()
    model(**batch_of(0)).loss.backward()
    optimizer.step()
    for entry in (first, second):
        moved = (entry.parameter != before[entry.name]).any(dim=1)
        assert torch.equal(moved, controller.weights[:24] > 0), entry.name


# ---- refused ----


REFUSED: dict[str, Callable[[], Any]] = {
    "VERA": lambda: peft.VeraConfig(target_modules=["gate_proj", "up_proj"], r=4),
    "LOHA": lambda: peft.LoHaConfig(target_modules=LLAMA_TARGETS),
    "LOKR": lambda: peft.LoKrConfig(target_modules=LLAMA_TARGETS),
    "IA3": lambda: peft.IA3Config(target_modules=LLAMA_TARGETS, feedforward_modules=["down_proj"]),
    "OFT": lambda: peft.OFTConfig(target_modules=LLAMA_TARGETS, oft_block_size=4, r=0),
    "RANDLORA": lambda: peft.RandLoraConfig(target_modules=["gate_proj", "up_proj"], r=4),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_tuners_are_refused_by_name(name: str) -> None:
    model = get_peft_model(tiny_llama(), REFUSED[name]())
    with pytest.raises(DiscoveryError, match=f"is adapted by {name}, which has no lora_B"):
        discover_gates(model)


def test_a_mixture_of_adapters_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("first", "second"):
        llama().save_pretrained(tmp_path / name)
    base = tiny_llama()
    base.config.use_cache = False
    adapters = {name: str(tmp_path / name) for name in ("first", "second")}
    mixed = get_peft_model(base, peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, adapters=adapters))
    with pytest.raises(DiscoveryError, match="is adapted by XLORA, which mixes LoRA adapters"):
        discover_gates(mixed)


def test_a_variant_that_freezes_b_is_refused() -> None:
    model = llama(init_lora_weights="mica")
    with pytest.raises(UpdateError, match="no trainable parameter with a row for each channel"):
        controlled(model, torch.optim.SGD(trained(model), lr=0.1))


@pytest.mark.parametrize(("options", "target"), [({"target_modules": ["up_proj"]}, "gate_proj")])
def test_a_gate_that_is_trained_in_full_is_refused(options: dict[str, Any], target: str) -> None:
    model = llama(modules_to_save=["gate_proj"], **options)
    with pytest.raises(DiscoveryError, match=f"add '{target}' to the LoRA target modules"):
        discover_gates(model).require()
