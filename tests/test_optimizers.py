"""Optimizers and schedules: the mask holds under each, closures count once, learning rates are those of plain LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.optimizers
import pytest
import reference
import torch
from lightning.pytorch import Callback
from lightning_models import ForeignModule, RowWatch, assert_equal_states, loader, lora_state, make_trainer
from peft import PeftModel
from stand_ins import Averaging, Lion, ScheduleFree
from tiny_models import LLAMA_TARGETS, random_batch, tiny_llama, with_lora
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from transformers import Adafactor

from na_lora_lightning import GateImportanceCallback, StepScaleCallback
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.errors import ConfigurationError, UpdateError

ALL_TOKENS = ObserverOptions(max_tokens=None)


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@pytest.fixture(autouse=True)
def of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the stand-in be of the package, and no longer than a test: jsonargparse imports what any optimizer is of."""
    monkeypatch.setattr(ScheduleFree, "__module__", "schedulefree.stand_in")


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda m: torch.optim.AdamW(trained(m), lr=1e-2, weight_decay=0.1, foreach=False),
    "adamw_foreach": lambda m: torch.optim.AdamW(trained(m), lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw_fused": lambda m: torch.optim.AdamW(trained(m), lr=1e-2, weight_decay=0.1, fused=True),
    "sgd_momentum": lambda m: torch.optim.SGD(trained(m), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adafactor": lambda m: torch.optim.Adafactor(trained(m), lr=1e-2),
    "adafactor_of_transformers": lambda m: Adafactor(trained(m), lr=1e-2, relative_step=False),
    "lion": lambda m: Lion(trained(m), lr=1e-3),
    "lora_plus": lambda m: peft.optimizers.create_loraplus_optimizer(
        m.model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0
    ),
    "lora_fa": lambda m: peft.optimizers.create_lorafa_optimizer(m.model, r=4, lora_alpha=8, lr=1e-2, weight_decay=0.1),
    "lbfgs": lambda m: torch.optim.LBFGS(trained(m), lr=0.1, max_iter=3),
    "lbfgs_line_search": lambda m: torch.optim.LBFGS(trained(m), max_iter=3, line_search_fn="strong_wolfe"),
    "schedule_free": lambda m: ScheduleFree(trained(m), lr=0.1),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = lambda m: torch.optim.Muon(trained(m), lr=1e-2)


class Optimized(ForeignModule):
    """ForeignModule with another optimizer and, perhaps, a scheduler; keeps what the scheduler says."""

    def __init__(self, optimizer: Callable[[Any], Optimizer], scheduler: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.groups: list[list[dict[str, Any]]] = []

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self)
        if self.make_scheduler is None:
            return optimizer
        scheduler = {"scheduler": self.make_scheduler(optimizer), "interval": "step"}
        if isinstance(scheduler["scheduler"], lr_scheduler.ReduceLROnPlateau):
            scheduler["monitor"] = "metric"
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        # No function of the weights, which differ between the runs that are compared.
        self.log("metric", float(self.global_step % 3))
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args: Any) -> None:
        groups = self.trainer.optimizers[0].param_groups
        self.groups.append([{name: value for name, value in group.items() if name != "params"} for group in groups])


def masking(**options: Any) -> GateImportanceCallback:
    settings = {"keep_fraction": 0.5, "warmup_steps": 1, "refresh_every": 1, "observer": ALL_TOKENS}
    return GateImportanceCallback(**{**settings, **options})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_rows_stay_under_clipping_and_accumulation(tmp_path: Path, name: str) -> None:
    importance = masking(warmup_steps=0)
    watch = RowWatch(importance)
    # Three batches, and then one.
    options = {} if "lbfgs" in name else {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}
    module = Optimized(OPTIMIZERS[name])
    callbacks: list[Callback] = [importance, watch, StepScaleCallback(observer=ALL_TOKENS)]
    make_trainer(tmp_path, callbacks=callbacks, **options).fit(module, loader())
    steps = 4 if options else 8
    assert importance.controller.importance.steps == steps  # type: ignore[union-attr]
    assert watch.masked == steps * 48 // 2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_rows_kept_is_bitwise_plain_lora(tmp_path: Path, name: str) -> None:
    found = []
    neutral = StepScaleCallback(eta_min=1.0, matrix_a_factor=1.0, observer=ALL_TOKENS)
    for callbacks in ([], [masking(keep_fraction=1.0), neutral]):
        module = Optimized(OPTIMIZERS[name])
        options = {} if "lbfgs" in name else {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}
        make_trainer(tmp_path, callbacks=callbacks, **options).fit(module, loader())
        found.append((module.losses, lora_state(module)))
    assert found[0][0] == found[1][0]
    assert_equal_states(found[0][1], found[1][1])


# ---- closures ----


def controlled(model: PeftModel, optimizer: Optimizer, matrix_a_factor: float = 1.0, **options: Any) -> GateController:
    controller = GateController(model, discover_gates(model).require(), ALL_TOKENS)
    settings = {"keep_fraction": 0.5, "warmup_steps": 0, "refresh_every": 1, **options}
    controller.set_importance(ImportanceOptions(**settings))
    controller.set_step_scale(StepScaleOptions(matrix_a_factor=matrix_a_factor))
    controller.attach([optimizer])
    return controller


@pytest.mark.parametrize("as_keyword", [False, True])
def test_of_a_closure_that_is_evaluated_again_the_first_evaluation_counts(as_keyword: bool) -> None:
    found = []
    for evaluations in (1, 4):
        model = with_lora(tiny_llama(), LLAMA_TARGETS)
        optimizer = torch.optim.LBFGS(trained(model), lr=0.5, max_iter=evaluations, max_eval=evaluations)
        controller = controlled(model, optimizer)
        controller.meter.enabled = True
        calls: list[int] = []

        def closure(model: PeftModel = model, optimizer: Optimizer = optimizer, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            optimizer.zero_grad()
            loss = model(**random_batch(0)).loss
            loss.backward()
            return loss

        optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
        assert len(calls) == evaluations
        assert controller.observer.forward_passes == 1
        assert controller.importance is not None
        assert controller.step_scale is not None
        assert controller.misalignment is not None
        found.append((controller.importance.responsiveness, controller.step_scale.scale, controller.misalignment[0]))
        assert controller.observer.enabled
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


def test_an_error_in_a_closure_leaves_the_observer_on() -> None:
    model = with_lora(tiny_llama(), LLAMA_TARGETS)
    optimizer = torch.optim.LBFGS(trained(model), max_iter=4)
    controller = controlled(model, optimizer)
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("in the second evaluation")
        loss = model(**random_batch(0)).loss
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="in the second evaluation"):
        optimizer.step(closure)
    assert controller.observer.enabled


class Subclassed(torch.optim.SGD):
    """Torch hooks ``step`` of the base class as well; takes no closure, and so cannot be stepped by Lightning."""

    def step(self) -> None:  # type: ignore[override]
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(0.01)
        super().step()
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(0.03)


def test_a_step_that_calls_that_of_its_base_class_is_one_step() -> None:
    # Once an SGD was made, its method is hooked.
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    model, twin = (with_lora(tiny_llama(), LLAMA_TARGETS) for _ in range(2))
    optimizer, plain = Subclassed(trained(model), lr=0.5), Subclassed(trained(twin), lr=0.5)
    controller = controlled(model, optimizer)
    name = f"base_model.model.{controller.gates.sites[0].lora_layer_name}.lora_B.default.weight"
    before = dict(model.named_parameters())[name].detach().clone()
    for each, one in ((model, optimizer), (twin, plain)):
        each(**random_batch(0)).loss.backward()
        one.step()
    assert controller.importance.steps == 1  # type: ignore[union-attr]
    weights = controller.weights[:24]
    # What comes after the base class's step is masked, and not scaled.
    of_base = dict(twin.named_parameters())[name].detach() - 0.03
    expected = reference.update_rows(before.tolist(), of_base.tolist(), weights.tolist())
    rows = dict(model.named_parameters())[name].detach()
    assert torch.equal(rows[weights == 0], before[weights == 0])
    kept = weights > 0
    assert torch.allclose(rows[kept], torch.tensor(expected)[kept] + 0.03, atol=1e-6)
    # An error inside of a step leaves hooks uncalled.
    optimizer.param_groups[0]["lr"] = None
    model(**random_batch(1)).loss.backward()
    with pytest.raises(TypeError):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert controller.importance.steps == 2  # type: ignore[union-attr]


def test_a_step_without_closure_under_manual_optimization(tmp_path: Path) -> None:
    class Manual(Optimized):
        automatic_optimization = False  # type: ignore[assignment]

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            self.manual_backward(self.model(**batch).loss / 2)
            if batch_idx % 2:
                optimizer.step()
                optimizer.zero_grad()

    importance = masking(warmup_steps=0)
    watch = RowWatch(importance)
    trainer = make_trainer(tmp_path, callbacks=[importance, watch])
    trainer.fit(Manual(lambda m: Subclassed(trained(m), lr=0.1)), loader())
    assert watch.masked == 4 * 48 // 2
    assert importance.controller.observer.forward_passes == 8  # type: ignore[union-attr]


def test_the_riemannian_optimizer_of_peft_under_manual_optimization(tmp_path: Path) -> None:
    class Manual(Optimized):
        automatic_optimization = False  # type: ignore[assignment]

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
            optimizer: Any = self.optimizers(use_pl_optimizer=False)
            self.manual_backward(self.model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()

    def make(module: Any) -> Optimizer:
        # It refuses closures, which Lightning always passes.
        return peft.optimizers.create_riemannian_optimizer(module.model, torch.optim.AdamW, lr=1e-2)

    importance = masking(warmup_steps=0)
    watch = RowWatch(importance)
    make_trainer(tmp_path, callbacks=[importance, watch]).fit(Manual(make), loader())
    assert watch.masked == 8 * 48 // 2


def test_another_optimizer_beside_that_of_the_gates(tmp_path: Path) -> None:
    class Two(Optimized):
        automatic_optimization = False  # type: ignore[assignment]

        def configure_optimizers(self) -> Any:
            lora = [p for n, p in self.named_parameters() if p.requires_grad and "lora" in n]
            self.head = nn.Parameter(torch.zeros(()))
            return torch.optim.AdamW(lora, lr=1e-2), torch.optim.SGD([self.head], lr=0.1)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
            first, second = self.optimizers()  # type: ignore[misc]
            self.manual_backward(self.model(**batch).loss + self.head.square())
            second.step()
            if batch_idx % 2:
                first.step()
                first.zero_grad()

    importance = masking(warmup_steps=0)
    watch = RowWatch(importance)
    make_trainer(tmp_path, callbacks=[importance, watch]).fit(Two(OPTIMIZERS["adamw"]), loader())
    assert importance.controller.importance.steps == 4  # type: ignore[union-attr]
    assert watch.masked == 4 * 48 // 2


# ---- schedule-free ----


def test_masked_rows_of_a_schedule_free_optimizer_stay_in_evaluation_too() -> None:
    model = with_lora(tiny_llama(), LLAMA_TARGETS)
    optimizer = ScheduleFree(trained(model), lr=0.5)
    controller = controlled(model, optimizer, refresh_every=100)
    (rows, *_), steps = controller.gates.sites[0].parameters(), 4

    def in_evaluation() -> Tensor:
        optimizer.eval()
        weights = rows.parameter.detach().clone()
        optimizer.train()
        return weights

    first = rows.parameter.detach().clone()
    for step in range(steps):
        optimizer.zero_grad()
        model(**random_batch(step)).loss.backward()
        z = optimizer.state[rows.parameter].get("z", rows.parameter).detach().clone()
        optimizer.step()
        weights = controller.weights[:24]
        moved = (optimizer.state[rows.parameter]["z"] != z).any(dim=1)
        assert torch.equal(moved, weights > 0)
    masked = controller.weights[:24] == 0
    assert int(masked.sum()) == 12
    assert torch.equal(rows.parameter[masked], first[masked])
    assert torch.allclose(in_evaluation()[masked], first[masked], atol=1e-7)
    assert bool((in_evaluation()[~masked] != first[~masked]).any(dim=1).all())


def test_the_average_of_a_schedule_free_optimizer_is_scaled_as_its_parameter_is() -> None:
    # y, z and x = y + (1 − 1/0.9)(z − y) are blended alike, so that x moves the fraction η of its way.
    model, twin = (with_lora(tiny_llama(), LLAMA_TARGETS) for _ in range(2))
    optimizer, plain = ScheduleFree(trained(model), lr=0.5), ScheduleFree(trained(twin), lr=0.5)
    controller = controlled(model, optimizer, matrix_a_factor=0.25, keep_fraction=1.0)
    layer = f"base_model.model.{controller.gates.sites[0].lora_layer_name}"
    before = {name: value.tolist() for name, value in model.named_parameters()}
    for each, one in ((model, optimizer), (twin, plain)):
        each(**random_batch(0)).loss.backward()
        one.step()
        one.eval()
    weights = {"lora_B": controller.weights[:24], "lora_A": torch.full((4,), 0.25)}
    assert 0.0 < float(weights["lora_B"].min()) < 1.0
    for kind, of_rows in weights.items():
        name = f"{layer}.{kind}.default.weight"
        after = dict(twin.named_parameters())[name].tolist()
        expected = reference.update_rows(before[name], after, of_rows.tolist())
        assert torch.allclose(dict(model.named_parameters())[name], torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "AdamWScheduleFreeClosure"])
def test_the_package_schedulefree(name: str) -> None:
    package = pytest.importorskip("schedulefree")
    model = with_lora(tiny_llama(), LLAMA_TARGETS)
    optimizer = getattr(package, name)(trained(model), lr=0.1, weight_decay=0.1)
    controller = controlled(model, optimizer, refresh_every=100)
    rows = controller.gates.sites[0].parameters()[0].parameter
    first = rows.detach().clone()
    change_mode = getattr(optimizer, "train", None)
    if change_mode is not None:
        change_mode()
    for step in range(3):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = model(**random_batch(step)).loss
            loss.backward()
            return loss

        optimizer.step(closure)
    if change_mode is not None:
        optimizer.eval()
    masked = controller.weights[:24] == 0
    assert torch.allclose(rows[masked], first[masked], atol=1e-7)
    assert bool((rows[~masked] != first[~masked]).any(dim=1).all())


# ---- refused ----


class _Lookahead(Optimizer):
    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups


class _NoHooks:
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.param_groups = [{"params": parameters}]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Averaging(p, lr=0.1), r"Averaging has train\(\) and eval\(\)"),
        (lambda p: _Lookahead(torch.optim.SGD(p, lr=0.1)), "_Lookahead wraps SGD and may move weights after"),
        (_NoHooks, "_NoHooks is not a torch.optim.Optimizer with hooks"),
    ],
)
def test_optimizers_that_move_rows_unseen_are_refused(make: Callable[..., Any], message: str) -> None:
    model = with_lora(tiny_llama(), LLAMA_TARGETS)
    with pytest.raises(UpdateError, match=message):
        controlled(model, make(trained(model)))


def test_they_are_refused_before_training(tmp_path: Path) -> None:
    module = Optimized(lambda m: Averaging(trained(m), lr=0.1))
    with pytest.raises(UpdateError, match="Averaging has"):
        make_trainer(tmp_path, callbacks=[masking()]).fit(module, loader())
    assert module.losses == []


def test_lbfgs_over_micro_batches_is_refused_before_training(tmp_path: Path) -> None:
    module = Optimized(OPTIMIZERS["lbfgs"])
    with pytest.raises(ConfigurationError, match="LBFGS evaluates its closure several times, and with accumulate_grad"):
        make_trainer(tmp_path, callbacks=[masking()], accumulate_grad_batches=2).fit(module, loader())
    assert module.losses == []


# ---- schedules ----


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "cosine_recursive": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "cosine_closed": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5 * (1 + math.cos(math.pi * step / 5))),
    "exponential_recursive": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.7),
    "exponential_closed": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.7**step),
    "warm_restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=3, T_mult=2),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=20, cycle_momentum=True),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_learning_rates_are_bitwise_those_of_plain_lora(tmp_path: Path, name: str) -> None:
    runs = []
    for callbacks in ([], [masking(), StepScaleCallback(observer=ALL_TOKENS)]):
        module = Optimized(OPTIMIZERS["adamw"], SCHEDULERS[name])
        make_trainer(tmp_path, callbacks=callbacks).fit(module, loader())
        runs.append((module.groups, lora_state(module)))
    plain, masked = runs[0][0], runs[1][0]
    # Momentum, which OneCycle cycles, is among the settings of a group.
    assert plain == masked
    assert len({group["lr"] for (group,) in plain}) > 1
    assert (len({group["betas"] for (group,) in plain}) > 1) == (name == "one_cycle")
    assert any(not torch.equal(value, runs[0][1][key]) for key, value in runs[1][1].items())
