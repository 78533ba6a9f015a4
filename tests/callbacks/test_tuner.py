"""Lightning's finders of a learning rate and a batch size: they sweep with the method, and leave nothing of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from lightning_models import Batches, ForeignModule, assert_equal_states, hooks_of, lora_state, make_trainer
from module_helpers import Batches as ReadyBatches
from module_helpers import quiet_trainer, saved_model, some_batches
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from na_lora_lightning import GateImportanceCallback, NALoRALightningModule, StepScaleCallback
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.errors import DiscoveryError, UpdateError

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    # Of the finders: they show progress on a bar of their own, and validate nothing.
    pytest.mark.filterwarnings("ignore:.*TqdmExperimentalWarning"),
]


def both(**options: Any) -> list[Any]:
    settings = {"keep_fraction": 0.5, "warmup_steps": 1, "refresh_every": 2, **options}
    return [GateImportanceCallback(**settings), StepScaleCallback(granularity="channel", normalize=False)]


class Tunable(ForeignModule):
    """Has a rate and a batch size, and keeps what it trained on."""

    def __init__(self, fail_at_step: int | None = None, **options: Any) -> None:
        super().__init__(fail_at_step=fail_at_step, **options)
        self.lr = 1e-2
        self.batch_size = 4

    def train_dataloader(self) -> DataLoader:
        rows = [{name: value[row] for name, value in b.items()} for b in Batches(8).batches for row in range(4)]
        return DataLoader(rows, batch_size=self.batch_size, collate_fn=default_collate)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


@pytest.fixture(autouse=True)
def _no_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch-size finder collects garbage before each trial, which is most of its time in this process."""
    monkeypatch.setattr("lightning.pytorch.tuner.batch_size_scaling.garbage_collection_cuda", lambda: None)


@pytest.fixture
def controllers(monkeypatch: pytest.MonkeyPatch) -> list[GateController]:
    """Every controller that is attached, in order."""
    attached: list[GateController] = []
    attach = GateController.attach

    def remember(self: GateController, *args: Any) -> None:
        attached.append(self)
        attach(self, *args)

    monkeypatch.setattr(GateController, "attach", remember)
    return attached


def trainer_of(folder: Path, callbacks: list[Any], **options: Any) -> Trainer:
    return make_trainer(folder, callbacks=callbacks, **{"max_epochs": 1, **options})


def assert_untouched(module: LightningModule, callbacks: list[Any], fresh: LightningModule) -> None:
    """No hook, no state, and the weights of a fresh module."""
    assert hooks_of(module) == hooks_of(fresh)
    assert_equal_states(lora_state(module), lora_state(fresh))
    for callback in callbacks:
        assert callback.controller is None
        assert callback.state_dict() == {}


def fit_alone(folder: Path, **options: Any) -> dict[str, Tensor]:
    module = Tunable()
    trainer_of(folder, both(), **options).fit(module)
    return lora_state(module)


def lr_find(folder: Path, callbacks: list[Any], module: Tunable, **options: Any) -> Any:
    trainer = trainer_of(folder, callbacks, **options)
    finder: Any = Tuner(trainer).lr_find(module, num_training=8, min_lr=1e-3, max_lr=1.0, update_attr=False)
    assert [type(callback) for callback in trainer.callbacks] == [type(callback) for callback in callbacks]
    return trainer, finder


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "max_epochs": 4}])
def test_the_learning_rate_is_found_with_the_method(
    tmp_path: Path, controllers: list[GateController], options: dict[str, Any]
) -> None:
    plain = lr_find(tmp_path, [], Tunable(), **options)[1].results
    kept = lr_find(tmp_path, both(keep_fraction=1.0)[:1], Tunable(), **options)[1].results
    masked = lr_find(tmp_path, both(keep_fraction=0.25), Tunable(), **options)[1].results
    assert kept == plain
    assert masked["lr"] == plain["lr"]
    # The scale acts from the first step on, which the second loss shows.
    assert masked["loss"][0] == plain["loss"][0]
    assert all(a != b for a, b in zip(masked["loss"][1:], plain["loss"][1:], strict=True))
    assert [controller.steps for controller in controllers] == [8, 8]


def test_after_a_learning_rate_sweep_fit_begins_at_zero(tmp_path: Path, controllers: list[GateController]) -> None:
    module, callbacks = Tunable(), both()
    trainer, _ = lr_find(tmp_path, callbacks, module)
    assert_untouched(module, callbacks, Tunable())
    trainer.fit(module)
    assert_equal_states(lora_state(module), fit_alone(tmp_path))
    assert callbacks[0].controller.importance.steps == trainer.global_step == 8
    assert [controller.steps for controller in controllers] == [8, 8, 8]


def test_a_sweep_between_two_fits_does_not_see_the_first(tmp_path: Path) -> None:
    callbacks = both()
    trainer_of(tmp_path, callbacks).fit(Tunable())
    module = Tunable()
    trainer, _ = lr_find(tmp_path, callbacks, module)
    assert_untouched(module, callbacks, Tunable())
    trainer.fit(module)
    assert_equal_states(lora_state(module), fit_alone(tmp_path))


def test_the_learning_rate_finder_as_a_callback(tmp_path: Path, controllers: list[GateController]) -> None:
    callbacks, module = both(), Tunable()
    finder = LearningRateFinder(min_lr=1e-3, max_lr=1.0, num_training_steps=8, update_attr=False)
    trainer = trainer_of(tmp_path, [*callbacks, finder])
    trainer.fit(module)
    assert_equal_states(lora_state(module), fit_alone(tmp_path))
    assert [controller.steps for controller in controllers[:2]] == [8, 8]
    assert callbacks[0].controller is controllers[1]
    # The finder is itself again.
    assert "lr_find" not in vars(finder)
    assert hooks_of(module) == hooks_of(Tunable())


def test_a_found_rate_is_used(tmp_path: Path) -> None:
    module, callbacks = Tunable(), both()
    finder = LearningRateFinder(min_lr=1e-4, max_lr=1e-1, num_training_steps=20, early_stop_threshold=None)
    trainer = trainer_of(tmp_path, [*callbacks, finder], max_epochs=3)
    trainer.fit(module)
    assert finder.optimal_lr is not None
    assert trainer.optimizers[0].param_groups[0]["lr"] == module.lr == finder.optimal_lr.suggestion() != 1e-2
    assert callbacks[0].controller.importance.steps == 24


class SweepsLate(LearningRateFinder):
    """Sweeps again at the second epoch, as Lightning's documentation shows."""

    def on_fit_start(self, *args: Any) -> None:
        return

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            self.lr_find(trainer, pl_module)


class Halves(Tunable):
    """Fails where the third step of a sweep would be."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.callbacks and type(self.trainer.callbacks[0]).__name__ == "_LRCallback" and batch_idx == 2:
            raise RuntimeError("the machine went down")
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_sweep_that_fails_leaves_no_hook(tmp_path: Path, controllers: list[GateController]) -> None:
    module, callbacks = Halves(), both()
    trainer = trainer_of(tmp_path, callbacks)
    with pytest.raises(RuntimeError, match="went down"):
        Tuner(trainer).lr_find(module, num_training=8, update_attr=False)
    assert [controller.steps for controller in controllers] == [2]
    assert not controllers[0].is_attached
    assert hooks_of(module) == hooks_of(Tunable())
    again = Tunable()
    trainer_of(tmp_path, callbacks).fit(again)
    assert_equal_states(lora_state(again), fit_alone(tmp_path))


def test_labels_of_the_batch_reach_a_sweep(tmp_path: Path, controllers: list[GateController]) -> None:
    """A module that computes its loss itself calls the model without them."""

    class OwnLoss(Tunable):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self.model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    module = OwnLoss()
    callbacks = [GateImportanceCallback(0.5, observer=ObserverOptions(exclude_prompt=True))]
    trainer, _ = lr_find(tmp_path, callbacks, module)
    assert [controller.steps for controller in controllers] == [8]
    assert "on_train_batch_start" not in vars(module)
    trainer.fit(module)


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
def test_a_sweep_of_the_module_of_this_package(tmp_path: Path, controllers: list[GateController]) -> None:
    module = NALoRALightningModule(saved_model(tmp_path / "model"))
    callbacks = [GateImportanceCallback(0.5, observer=ObserverOptions(exclude_prompt=True))]
    trainer = quiet_trainer(tmp_path, callbacks=callbacks)
    data = ReadyBatches(some_batches(6))
    finder: Any = Tuner(trainer).lr_find(module, datamodule=data, num_training=4, update_attr=False)
    assert len(finder.results["loss"]) == 4
    assert not lora_state(module.peft_model)[
        "base_model.model.model.layers.0.mlp.gate_proj.lora_B.default.weight"
    ].any()
    trainer.fit(module, datamodule=data)
    assert [controller.steps for controller in controllers] == [4, 6]


def test_what_cannot_be_followed_is_refused_before_the_sweep(tmp_path: Path) -> None:
    class Frozen(Tunable):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for n, p in self.named_parameters() if "q_proj.lora" in n], lr=0.1)

    for module, error in ((Tunable(target_modules=["q_proj"]), DiscoveryError), (Frozen(), UpdateError)):
        with pytest.raises(error):
            lr_find(tmp_path, both(), module)
        assert module.losses == []


def test_a_sweep_before_a_resumed_fit(tmp_path: Path, controllers: list[GateController]) -> None:
    """The sweep resumes from the checkpoint's statistics, and so does the fit after it."""
    trainer = trainer_of(tmp_path, both(), max_steps=4)
    trainer.fit(Tunable())
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    callbacks = both()
    finder = LearningRateFinder(num_training_steps=4, update_attr=False)
    trainer = trainer_of(tmp_path, [*callbacks, finder])
    trainer.fit(Tunable(), ckpt_path=tmp_path / "four.ckpt", weights_only=True)
    assert [controller.importance.steps for controller in controllers[:2]] == [4, 4]  # type: ignore[union-attr]
    # Lightning itself counts from zero again: its finder drops the loops of the checkpoint.
    assert trainer.global_step == 8
    assert callbacks[0].controller.importance.steps == 4 + 8


def test_a_sweep_in_the_middle_of_a_fit(tmp_path: Path, controllers: list[GateController]) -> None:
    callbacks, module = both(), Tunable()
    finder = SweepsLate(min_lr=1e-3, max_lr=1.0, num_training_steps=4, update_attr=False)
    trainer = trainer_of(tmp_path, [*callbacks, finder], max_epochs=3)
    trainer.fit(module)
    assert controllers[0].steps > trainer.global_step
    assert callbacks[0].controller.importance.steps == trainer.global_step == 24
    assert_equal_states(lora_state(module), fit_alone(tmp_path, max_epochs=3))


@pytest.mark.parametrize("mode", ["power", "binsearch"])
def test_the_batch_size_is_found_with_the_method(tmp_path: Path, controllers: list[GateController], mode: str) -> None:
    module, callbacks = Tunable(), both()
    trainer = trainer_of(tmp_path, callbacks)
    size = Tuner(trainer).scale_batch_size(module, mode=mode, init_val=2, max_trials=3, steps_per_trial=2, margin=0.0)
    assert size == module.batch_size == 8
    # Three trials of two steps.
    assert [controller.steps for controller in controllers] == [6]
    assert_untouched(module, callbacks, Tunable())
    module.batch_size = 4
    trainer.fit(module)
    assert_equal_states(lora_state(module), fit_alone(tmp_path))


def test_the_batch_size_finder_as_a_callback(tmp_path: Path, controllers: list[GateController]) -> None:
    module, callbacks = Tunable(), both()
    finder = BatchSizeFinder(init_val=2, max_trials=2, steps_per_trial=1)
    trainer_of(tmp_path, [*callbacks, finder]).fit(module)
    assert module.batch_size == 4
    assert_equal_states(lora_state(module), fit_alone(tmp_path))
    assert [controller.steps for controller in controllers[:2]] == [2, 8]


def test_a_size_that_runs_out_of_memory(tmp_path: Path, controllers: list[GateController]) -> None:
    class Small(Tunable):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if len(batch["labels"]) > 4:
                raise RuntimeError("CUDA out of memory.")
            return loss

    module, callbacks = Small(), both()
    trainer = trainer_of(tmp_path, callbacks)
    assert Tuner(trainer).scale_batch_size(module, init_val=2, steps_per_trial=1) == 4
    assert [controller.steps for controller in controllers] == [2]
    assert_untouched(module, callbacks, Tunable())
