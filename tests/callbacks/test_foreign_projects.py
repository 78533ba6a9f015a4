"""The two callbacks in Lightning projects of every shape: right, or refused before training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foreign_modules import (
    PLAIN_CHANNELS,
    PLAIN_EXAMPLE,
    BuiltLate,
    Delegating,
    Distilled,
    Held,
    Injected,
    LayersOnTheModule,
    Manual,
    OddBatches,
    PlainModule,
    PlainNetwork,
    Record,
    Stream,
    Validated,
    WithBackbone,
    plain_injected_network,
    plain_loader,
)
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning_models import (
    Batches,
    ForeignModule,
    RowWatch,
    assert_equal_states,
    hooks_of,
    loader,
    lora_state,
    make_trainer,
    tiny_peft_model,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from na_lora_lightning import GateImportanceCallback, StepScaleCallback
from na_lora_lightning.callbacks.model_search import find_peft_model
from na_lora_lightning.errors import ConfigurationError, DiscoveryError, UpdateError

pytestmark = [
    # Lightning's advice, and what it says of trainers as odd as these.
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback"),
    pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch"),
    pytest.mark.filterwarnings("ignore:.*is not set. This can cause"),
]


def check(
    folder: Path,
    make_module: Callable[[], LightningModule],
    make_data: Callable[[], Any] = loader,
    make_others: Callable[[], list[Callback]] = list,
    example_inputs: Any = None,
    **options: Any,
) -> tuple[Any, GateImportanceCallback]:
    """Fits three times: watching alone is bitwise plain LoRA, and masked rows stay at each optimizer step."""
    plain, watched, masked = make_module(), make_module(), make_module()
    make_trainer(folder, callbacks=make_others(), **options).fit(plain, make_data())
    watching: list[Callback] = [
        GateImportanceCallback(keep_fraction=1.0, warmup_steps=0, example_inputs=example_inputs),
        StepScaleCallback(eta_min=1.0, example_inputs=example_inputs),
    ]
    make_trainer(folder, callbacks=[*make_others(), *watching], **options).fit(watched, make_data())
    assert_equal_states(lora_state(plain), lora_state(watched))
    importance = GateImportanceCallback(0.25, warmup_steps=0, refresh_every=1, example_inputs=example_inputs)
    watch = RowWatch(importance)
    trainer = make_trainer(folder, callbacks=[*make_others(), importance, watch], **options)
    trainer.fit(masked, make_data())
    controller: Any = importance.controller
    assert controller.steps > 0
    assert watch.masked == controller.steps * controller.gates.channels * 3 // 4
    assert masked.global_step == trainer.global_step
    if masked.automatic_optimization:
        assert controller.steps == importance._mechanism.steps == trainer.global_step  # type: ignore[union-attr]
    assert hooks_of(masked) == hooks_of(plain)
    return masked, importance


# ---- where the model is, and who made it ----


def _as_attribute(module: Held, model: nn.Module) -> None:
    module.anything = model


def _in_a_module_list(module: Held, model: nn.Module) -> None:
    module.models = nn.ModuleList([nn.Linear(1, 1).requires_grad_(False), model])


def _twice(module: Held, model: Any) -> None:
    module.base = model.get_base_model()
    module.anything = model


@pytest.mark.parametrize(
    ("hold", "get"),
    [
        (_as_attribute, lambda module: module.anything),
        (_in_a_module_list, lambda module: module.models[1]),
        (_twice, lambda module: module.anything),
    ],
)
def test_a_peft_model_anywhere_in_the_module(tmp_path: Path, hold: Any, get: Any) -> None:
    check(tmp_path, lambda: Held(hold, get))


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_a_model_that_is_built_late(tmp_path: Path, hook: str) -> None:
    check(tmp_path, lambda: BuiltLate(hook))


@pytest.mark.parametrize("how", ["add_adapter", "inject_adapter_in_model"])
def test_lora_without_a_peft_model(tmp_path: Path, how: str) -> None:
    module, _ = check(tmp_path, lambda: Injected(how))
    assert find_peft_model(module) is module.model


def test_a_module_that_hands_on_attributes(tmp_path: Path) -> None:
    check(tmp_path, Delegating)


def test_a_frozen_teacher_beside_the_student(tmp_path: Path) -> None:
    module, _ = check(tmp_path, Distilled)
    assert find_peft_model(module) is module.model


@pytest.mark.parametrize("make_module", [PlainModule, lambda: PlainModule(plain_injected_network()), LayersOnTheModule])
def test_networks_that_are_not_hugging_face(tmp_path: Path, make_module: Callable[[], LightningModule]) -> None:
    _, importance = check(tmp_path, make_module, plain_loader, example_inputs=PLAIN_EXAMPLE)
    assert importance.controller is not None
    assert [(site.name.split(".")[-1], site.channels) for site in importance.controller.gates] == [
        ("activation", PLAIN_CHANNELS)
    ]


def test_examples_are_compared_by_value(tmp_path: Path) -> None:
    def callbacks(other: Tensor) -> list[Callback]:
        return [
            GateImportanceCallback(example_inputs=PLAIN_EXAMPLE),
            StepScaleCallback(example_inputs={"features": other}),
        ]

    same = PLAIN_EXAMPLE["features"].clone()
    make_trainer(tmp_path, callbacks=callbacks(same), fast_dev_run=True).fit(PlainModule(), plain_loader())
    with pytest.raises(ConfigurationError, match="different values of example_inputs"):
        make_trainer(tmp_path, callbacks=callbacks(same + 1), fast_dev_run=True).fit(PlainModule(), plain_loader())


def _fit_refused(folder: Path, module: LightningModule, data: Any = None) -> None:
    """A fit that has to stop before the first batch, and leaves no hook."""
    before = lora_state(module)
    make_trainer(folder, callbacks=[GateImportanceCallback(), StepScaleCallback()]).fit(module, data or loader())
    assert_equal_states(before, lora_state(module))


@pytest.mark.parametrize(
    ("hold", "name"),
    [
        (lambda module, model: setattr(module, "models", [model]), r"models\[0\]"),
        (lambda module, model: setattr(module, "models", {"policy": (1, model)}), r"models\['policy'\]\[1\]"),
        (lambda module, model: setattr(module, "holder", SimpleNamespace(inner=model)), r"holder\.inner"),
    ],
)
def test_a_model_that_lightning_does_not_see_is_named(tmp_path: Path, hold: Any, name: str) -> None:
    message = rf"Held\.{name} holds a PEFT model .* use nn.ModuleList or nn.ModuleDict"
    module = Held(hold, lambda module: tiny_peft_model("llama"))
    # Lightning makes the optimizer before callbacks can look.
    with pytest.raises(ValueError, match="empty parameter list"), pytest.warns(UserWarning, match=message):
        _fit_refused(tmp_path, module)
    module.visible = nn.Linear(1, 1)
    with pytest.raises(DiscoveryError, match=message):
        _fit_refused(tmp_path, module)


def test_a_plain_network_needs_an_example(tmp_path: Path) -> None:
    with pytest.raises(DiscoveryError, match=r"PlainNetwork has no vocabulary size .* pass example_inputs"):
        _fit_refused(tmp_path, PlainModule(), plain_loader())


@pytest.mark.parametrize(
    ("example_inputs", "message"),
    [
        ({"x": torch.ones(2, 6)}, r"PlainNetwork does not take x alone \(TypeError: .*give example_inputs the names"),
        ({"features": torch.ones(2, 7)}, r"does not take features alone \(RuntimeError: .*the names and shapes"),
        (torch.ones(2, 6), "example_inputs is a Tensor, which says nothing of the arguments' names"),
    ],
)
def test_examples_that_do_not_fit_are_refused(tmp_path: Path, example_inputs: Any, message: str) -> None:
    callback = GateImportanceCallback(example_inputs=example_inputs)
    with pytest.raises(DiscoveryError, match=message):
        make_trainer(tmp_path, callbacks=[callback]).fit(PlainModule(), plain_loader())


def test_layers_on_a_module_without_forward_are_refused() -> None:
    class NoForward(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.gate = plain_injected_network().gate

        def training_step(self, batch: Any) -> None: ...

        def configure_optimizers(self) -> None: ...

    with pytest.raises(DiscoveryError, match="LoRA layers stand directly on NoForward, which has no forward"):
        find_peft_model(NoForward())


def test_two_networks_without_a_peft_model_are_refused() -> None:
    module = PlainModule(plain_injected_network())
    module.second = plain_injected_network()
    with pytest.raises(ConfigurationError, match=r"PlainModule holds 2 PEFT models \(network, second\)"):
        find_peft_model(module)


def test_a_network_without_lora_is_refused() -> None:
    with pytest.raises(DiscoveryError, match="PlainModule holds no PEFT model; wrap the network"):
        find_peft_model(PlainModule(PlainNetwork()))


# ---- batches and loaders ----


def _as_object(parts: tuple[Tensor, Tensor, Tensor]) -> SimpleNamespace:
    return SimpleNamespace(tokens=parts[0], real=parts[1], targets=parts[2])


@pytest.mark.parametrize("form", [tuple, list, Record._make, _as_object])
def test_batches_that_are_no_mapping(tmp_path: Path, form: Callable[[Any], Any]) -> None:
    """Padding is left out of the statistics, because the model itself is told of it."""
    batches = [form((b["input_ids"], b["attention_mask"], b["labels"])) for b in Batches(4).batches]
    data = DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)
    found = []
    for module, batch in ((OddBatches(), data), (ForeignModule(), loader())):
        importance = GateImportanceCallback(0.5, warmup_steps=0)
        make_trainer(tmp_path, callbacks=[importance], max_epochs=1).fit(module, batch)
        found.append(importance.controller.importance.importance)  # type: ignore[union-attr]
    assert torch.allclose(found[0], found[1], atol=1e-6)


class Combined(ForeignModule):
    """Takes a batch of each of two loaders."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if isinstance(batch, tuple):
            return super().training_step(batch[0], batch_idx)
        return sum(super(Combined, self).training_step(b, batch_idx) for b in batch.values() if b is not None)  # type: ignore[return-value]


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "max_size"])
def test_several_loaders(tmp_path: Path, mode: str) -> None:
    check(tmp_path, Combined, lambda: CombinedLoader({"long": loader(4), "short": loader(2)}, mode), max_epochs=1)


def test_a_data_set_without_length(tmp_path: Path) -> None:
    check(tmp_path, ForeignModule, lambda: DataLoader(Stream(), batch_size=None), accumulate_grad_batches=3)


# ---- options of the trainer ----


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"limit_train_batches": 3}, 6),
        ({"overfit_batches": 2}, 4),
        ({"fast_dev_run": 3}, 3),
        ({"max_time": "00:01:00:00"}, 8),
        ({"max_steps": 5}, 5),
        ({"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}, 4),
        ({"precision": "bf16-mixed"}, 8),
        ({"barebones": True}, 8),
    ],
)
def test_options_of_the_trainer(tmp_path: Path, options: dict[str, Any], steps: int) -> None:
    if options.get("barebones"):
        options |= {"logger": None, "enable_checkpointing": None, "log_every_n_steps": None}
    module, _ = check(tmp_path, ForeignModule, **options)
    assert module.global_step == steps


@pytest.mark.parametrize("accumulated", [1, 3])
def test_validation_in_the_middle_of_an_epoch_is_not_observed(tmp_path: Path, accumulated: int) -> None:
    found, forward_passes = [], []
    for limit in (0, 2):
        module, importance = Validated(), GateImportanceCallback(0.5, warmup_steps=0, refresh_every=1)
        trainer = make_trainer(
            tmp_path,
            callbacks=[importance, StepScaleCallback()],
            val_check_interval=0.25,
            num_sanity_val_steps=2,
            limit_val_batches=limit,
            accumulate_grad_batches=accumulated,
        )
        trainer.fit(module, loader(), loader())
        assert module.validations == (2 + 2 * 8 if limit else 0)
        found.append(lora_state(module))
        forward_passes.append(importance.controller.observer.forward_passes)  # type: ignore[union-attr]
    assert forward_passes == [8, 8]
    assert_equal_states(found[0], found[1])


# ---- other callbacks ----


@pytest.mark.parametrize(
    "make_others",
    [
        lambda: [GradientAccumulationScheduler({0: 1, 1: 2})],
        lambda: [StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)],
        lambda: [WeightAveraging()],
        lambda: [EMAWeightAveraging(decay=0.5)],
    ],
)
def test_beside_other_callbacks(tmp_path: Path, make_others: Callable[[], list[Callback]]) -> None:
    check(tmp_path, ForeignModule, make_others=make_others, max_epochs=3)


def test_beside_early_stopping(tmp_path: Path) -> None:
    def stopping() -> list[Callback]:
        return [EarlyStopping("val_loss", patience=1, min_delta=100.0)]

    class WithData(Validated):
        def val_dataloader(self) -> Any:
            return loader(2)

    module, _ = check(tmp_path, WithData, make_others=stopping, max_epochs=9)
    assert module.global_step == 8


def test_a_backbone_that_thaws_in_the_middle(tmp_path: Path) -> None:
    module, importance = check(
        tmp_path,
        WithBackbone,
        make_others=lambda: [BackboneFinetuning(unfreeze_backbone_at_epoch=1, initial_denom_lr=1.0)],
    )
    assert len(importance._optimizer.param_groups) == 2  # type: ignore[union-attr]
    assert not torch.equal(module.backbone.weight, WithBackbone().backbone.weight)


def test_frozen_gates_are_refused(tmp_path: Path) -> None:
    class Frozen(WithBackbone):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = self.network
            self.head = nn.Linear(1, 1)

    trainer = make_trainer(tmp_path, callbacks=[BackboneFinetuning(1), GateImportanceCallback()])
    with pytest.raises(UpdateError, match="has no trainable parameter"):
        trainer.fit(Frozen(), loader())


# ---- manual optimization ----


@pytest.mark.parametrize("every", [1, 2])
def test_manual_optimization(tmp_path: Path, every: int) -> None:
    _, importance = check(tmp_path, lambda: Manual(every))
    controller: Any = importance.controller
    assert controller.steps == 8 // every
    assert controller.observer.forward_passes == 8


def test_manual_accumulation_counts_all_micro_batches(tmp_path: Path) -> None:
    found = []
    for module, options in ((Manual(4), {}), (ForeignModule(), {"accumulate_grad_batches": 4})):
        importance = GateImportanceCallback(0.5)
        make_trainer(tmp_path, callbacks=[importance], max_epochs=1, **options).fit(module, loader())
        found.append(importance.controller.importance.responsiveness)  # type: ignore[union-attr]
    assert torch.equal(found[0], found[1])
