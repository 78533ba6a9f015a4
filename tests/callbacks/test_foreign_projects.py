"""The two callbacks in Lightning projects of every shape: right, or refused before training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foreign_modules import (
    Manual,
    OddBatches,
    Record,
    Stream,
    Validated,
    WithBackbone,
)
from lightning.pytorch import Callback
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
    assert_equal_states,
    check,
    loader,
    lora_state,
    make_trainer,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from na_lora_lightning import GateImportanceCallback, StepScaleCallback
from na_lora_lightning.errors import UpdateError

pytestmark = [
    # Lightning's advice, and what it says of trainers as odd as these.
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback"),
    pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch"),
    pytest.mark.filterwarnings("ignore:.*is not set. This can cause"),
]


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
    assert len(importance._session._optimizer.param_groups) == 2  # type: ignore[union-attr]
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
