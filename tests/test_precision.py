"""Precisions: the mask holds in each, all rows kept is plain LoRA, skipped steps count nothing, no needless copies."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning_models import ForeignModule, RowWatch, assert_equal_states, loader, lora_state, make_trainer
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import LLAMA_TARGETS, PLAIN_IMPORTANCE, PLAIN_SCALE, random_batch, tiny_llama, with_lora
from torch import Tensor, nn

from na_lora_lightning import GateImportanceCallback, StepScaleCallback
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.models.lora_inputs import CastingLinear, keep_inputs_uncast
from na_lora_lightning.modules.optimization import make_optimizer

ALL_TOKENS = ObserverOptions(max_tokens=None)
PRECISIONS = ["32-true", "64-true", "bf16-mixed", "bf16-true", "16-mixed"]


def precision(name: str, **scaler: Any) -> dict[str, Any]:
    """Trainer arguments; Lightning itself has no scaler for a CPU, and torch has."""
    if name != "16-mixed":
        return {"precision": name}
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0, **scaler))]}


class ConstantRate(ForeignModule):
    """No scheduler, which Lightning would step after a skipped step too."""

    fused = False

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, fused=self.fused or None)


def masking(**options: Any) -> GateImportanceCallback:
    settings = {**PLAIN_IMPORTANCE, "warmup_steps": 0, "refresh_every": 1, "observer": ALL_TOKENS}
    return GateImportanceCallback(**{**settings, **options})


@pytest.mark.parametrize("name", PRECISIONS)
def test_the_mask_holds(tmp_path: Path, name: str) -> None:
    importance = masking()
    watch = RowWatch(importance)
    module = ForeignModule()
    scale = StepScaleCallback(**PLAIN_SCALE, observer=ALL_TOKENS)
    make_trainer(tmp_path, callbacks=[importance, watch, scale], **precision(name)).fit(module, loader())
    assert watch.masked == 8 * 48 // 2
    controller: Any = importance.controller
    rows = controller.gates.sites[0].parameters()[0].parameter
    assert rows.dtype == {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(name, torch.float32)
    assert controller.importance.importance.dtype == torch.float32
    assert 0.0 < float(controller.step_scale.scale.max()) < 1.0


@pytest.mark.parametrize("name", PRECISIONS)
def test_all_rows_kept_is_bitwise_plain_lora(tmp_path: Path, name: str) -> None:
    found = []
    neutral = StepScaleCallback(eta_min=1.0, matrix_a_factor=1.0, observer=ALL_TOKENS)
    for callbacks in ([], [masking(keep_fraction=1.0), neutral]):
        module = ForeignModule()
        options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, **precision(name)}
        make_trainer(tmp_path, callbacks=callbacks, **options).fit(module, loader())
        found.append((module.losses, lora_state(module)))
    assert found[0][0] == found[1][0]
    assert_equal_states(found[0][1], found[1][1])


class Vectors(LightningModule):
    """A network that takes floating inputs, and so has to be told what they look like."""

    def __init__(self, tokens: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(6, 12), nn.SiLU(), nn.Linear(12, 6))
        self.network = get_peft_model(network, LoraConfig(r=3, target_modules=["0"]))
        self.example_inputs = {"input": torch.randn(1, 3, 6)}
        self.tokens = tokens
        self.seen: list[Tensor] = []
        network[1].register_forward_pre_hook(lambda module, args: self.seen.append(args[0].detach()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.network(batch).square().mean()

    def train_dataloader(self) -> Any:
        batch = 3.0 * torch.randn(2, self.tokens, 6, generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader([batch], batch_size=None)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("name", PRECISIONS)
def test_statistics_of_many_tokens_are_in_float32(tmp_path: Path, name: str) -> None:
    # 1,200 tokens without a mask: bfloat16 counts to 256, and its products have three digits.
    module, importance = Vectors(tokens=600), masking()
    scale = StepScaleCallback(**PLAIN_SCALE, observer=ALL_TOKENS)
    make_trainer(tmp_path, callbacks=[importance, scale], max_epochs=1, **precision(name)).fit(module)
    tokens = module.seen[-1].flatten(0, 1).tolist()
    controller: Any = importance.controller
    expected = reference.responsiveness("selection_derivative", "silu", tokens)
    assert controller.importance.responsiveness.tolist() == pytest.approx(expected, rel=1e-5)
    shares, gaps = reference.regime_shares("silu", [value for token in tokens for value in token], 0.1)
    assert float(controller.step_scale.scale[0]) == pytest.approx(reference.step_scale(shares, gaps, 0.1), rel=1e-5)


@pytest.mark.parametrize("name", PRECISIONS)
def test_manual_steps_inside_of_autocast_are_corrected_in_float32(tmp_path: Path, name: str) -> None:
    class Manual(Vectors):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.weights: Tensor | None = None

        def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
            optimizer: Any = self.optimizers()
            self.manual_backward(self.network(batch).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            self.weights = controller_of(importance).weights

    def controller_of(callback: GateImportanceCallback) -> GateController:
        assert callback.controller is not None
        return callback.controller

    module, importance = Manual(), masking()
    make_trainer(tmp_path, callbacks=[importance], max_epochs=1, **precision(name)).fit(module)
    assert module.weights is not None
    found = controller_of(importance).importance.responsiveness  # type: ignore[union-attr]
    expected = reference.responsiveness("selection_derivative", "silu", module.seen[-1].flatten(0, 1).tolist())
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert int((controller_of(importance).weights > 0).sum()) == 6


def test_a_base_of_several_dtypes_is_probed_under_autocast(tmp_path: Path) -> None:
    module = ForeignModule()
    for name, inner in module.model.get_base_model().named_modules():
        # float32 norms before bfloat16 layers, which multiply nothing without autocast.
        if "lora_" not in name:
            for parameter in inner.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.float32 if "norm" in name else torch.bfloat16)
    importance = masking()
    watch = RowWatch(importance)
    make_trainer(tmp_path, callbacks=[importance, watch], precision="bf16-mixed").fit(module, loader())
    assert watch.masked == 8 * 48 // 2


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_moves_nothing_and_counts_nothing(tmp_path: Path, fused: bool) -> None:
    # The first scale overflows, and falls to 8 at once.
    skipping = {"init_scale": 2.0**40, "backoff_factor": 2.0**-37}
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **skipping))
    skipped, plain = ConstantRate(), ConstantRate()
    skipped.fused = plain.fused = fused
    first, second = masking(), masking()
    watch = RowWatch(first)
    options = {"max_epochs": 1, "accumulate_grad_batches": 2}
    batches = loader(count=6).dataset
    make_trainer(tmp_path, callbacks=[first, watch], plugins=[plugin], **options).fit(skipped, loader(count=6))
    later = torch.utils.data.Subset(batches, range(2, 6))
    loader_of_later = torch.utils.data.DataLoader(later, batch_size=None)
    make_trainer(tmp_path, callbacks=[second], **options, **precision("16-mixed")).fit(plain, loader_of_later)
    assert watch.masked == 2 * 48 // 2
    controllers: Any = first.controller, second.controller
    assert [controller.importance.steps for controller in controllers] == [2, 2]
    assert torch.equal(controllers[0].importance.importance, controllers[1].importance.importance)
    assert_equal_states(lora_state(skipped), lora_state(plain))


class FusedByDefault(ForeignModule):
    """The optimizer as this package's modules make it."""

    fuse = True

    def configure_optimizers(self) -> Any:
        return make_optimizer(partial(torch.optim.AdamW, lr=1e-2), self, self.model, self.fuse)


@pytest.mark.parametrize("name", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_fused_by_default_clips_and_scales_as_torchs_default(tmp_path: Path, name: str) -> None:
    found = []
    for fuse in (True, False):
        module = FusedByDefault()
        module.fuse = fuse
        options = {"gradient_clip_val": 0.01, "accumulate_grad_batches": 2, "max_epochs": 1}
        make_trainer(tmp_path, callbacks=[masking()], **options, **precision(name)).fit(module, loader())
        found.append(lora_state(module))
    for one, other in zip(found[0].values(), found[1].values(), strict=True):
        exact = one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=1e-3 if exact else 2e-2, atol=1e-5 if exact else 1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_a_plain_loop_with_a_scaler_skips_likewise(fused: bool) -> None:
    model = with_lora(tiny_llama(), LLAMA_TARGETS)
    controller = GateController(model, discover_gates(model).require(), ALL_TOKENS)
    importance = controller.set_importance(ImportanceOptions(warmup_steps=0, refresh_every=1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=fused or None)
    controller.attach([optimizer])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-37)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(2):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**random_batch(step)).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert (moved, importance.steps) == ((True, 1) if step else (False, 0))


def test_lightning_trains_16_mixed_on_a_cpu_in_bfloat16(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU"):
        trainer = make_trainer(tmp_path, precision="16-mixed")
    assert trainer.precision == "bf16-mixed"


# ---- float32 adapters on a 16-bit base ----


def sixteen_bit_llama(**options: object) -> PeftModel:
    base = tiny_llama().to(torch.bfloat16)
    return with_lora(base, LLAMA_TARGETS, **options)


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_adapters_on_a_bfloat16_base(autocast: bool) -> None:
    model = sixteen_bit_llama()
    gates = discover_gates(model).require()
    assert [site.found_by for site in gates] == ["probe", "probe"]
    assert all(site.rows.tolist() == list(range(24)) for site in gates)
    controller = GateController(model, gates, ALL_TOKENS)
    importance = controller.set_importance(ImportanceOptions(**PLAIN_IMPORTANCE, warmup_steps=0))
    controller.set_step_scale(StepScaleOptions())
    kept: list[list[list[float]]] = []
    for site in gates:
        keep = site.source.module.register_forward_pre_hook
        keep(lambda module, args: kept.append(args[0].detach().flatten(0, 1).float().tolist()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller.attach([optimizer])
    before = [site.parameters()[0].parameter.detach().clone() for site in gates]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(**random_batch(0, padded=False)).loss
    loss.backward()
    optimizer.step()
    expected = [value for tokens in kept for value in reference.responsiveness("selection_derivative", "silu", tokens)]
    assert importance.responsiveness.tolist() == pytest.approx(expected, rel=1e-5)
    for site, old, weights in zip(gates, before, controller.weights.split(24), strict=True):
        rows = site.parameters()[0].parameter
        assert rows.dtype == torch.float32
        assert torch.equal((rows != old).any(dim=1), weights > 0)


def gradients_and_bytes(model: PeftModel, autocast: bool) -> tuple[dict[str, Tensor], Tensor, int]:
    """Gradients, loss, and the bytes of activations that autograd keeps for them."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in parameters:
            kept[place] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast, cache_enabled=False),
    ):
        loss = model(**random_batch(0, batch=4, length=32)).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients, loss, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("autocast", [False, True])
def test_no_float32_copy_of_the_inputs_is_kept(autocast: bool) -> None:
    plain, lean = sixteen_bit_llama(target_modules="all-linear"), sixteen_bit_llama(target_modules="all-linear")
    assert keep_inputs_uncast(lean) == 2 * 7
    expected, loss, many = gradients_and_bytes(plain, autocast)
    found, same_loss, few = gradients_and_bytes(lean, autocast)
    assert torch.equal(loss, same_loss)
    assert all(torch.equal(gradient, found[name]) for name, gradient in expected.items())
    # q, k and v share an input, and so do gate and up: 4 inputs a layer, where there were 7 copies.
    assert few < (0.9 if autocast else 0.8) * many


def test_layers_that_use_their_input_otherwise_keep_their_casts() -> None:
    assert keep_inputs_uncast(sixteen_bit_llama(lora_dropout=0.1)) == 0
    assert keep_inputs_uncast(sixteen_bit_llama(use_dora=True)) == 0
    model = sixteen_bit_llama()
    assert keep_inputs_uncast(model) == keep_inputs_uncast(model) == 2 * len(LLAMA_TARGETS)
    assert sum(type(module) is CastingLinear for module in model.modules()) == 2 * len(LLAMA_TARGETS)
    assert all(type(module) is not CastingLinear for name, module in model.named_modules() if "lora_A" not in name)
