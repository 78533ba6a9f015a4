"""Trainers of ``pytorch_lightning``, whose classes are not those of ``lightning.pytorch``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from lightning_models import assert_equal_states, hooks_of, loader, lora_state, tiny_peft_model
from torch import Tensor

from na_lora_lightning import GateImportanceCallback, StepScaleCallback
from na_lora_lightning.errors import DiscoveryError, UpdateError

other = pytest.importorskip("pytorch_lightning")
PACKAGES = pytest.mark.parametrize("package", [lightning.pytorch, other], ids=["lightning", "pytorch_lightning"])


def make_module(package: Any, **options: Any) -> Any:
    """The same project, written against either package."""

    class Project(package.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_peft_model("llama", **options)
            self.lr = 1e-2
            self.losses: list[float] = []

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            self.losses.append(loss.item())
            return loss

        def train_dataloader(self) -> Any:
            return loader()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)

    return Project()


def make_trainer(package: Any, folder: Path, callbacks: Any, **options: Any) -> Any:
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "log_every_n_steps": 1,
    }
    return package.Trainer(callbacks=callbacks, **{**settings, **options})


def both(keep_fraction: float = 0.5) -> list[Any]:
    importance = GateImportanceCallback(keep_fraction, warmup_steps=1, histogram_every_n_steps=4)
    return [importance, StepScaleCallback("channel", normalize=True)]


def curves(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), {"histograms": 9}).Reload()
    tags = events.Tags()
    found: dict[str, list[tuple[int, Any]]] = {}
    for tag in tags["scalars"]:
        found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    for tag in tags["histograms"]:
        found[tag] = [(event.step, event.histogram_value.bucket) for event in events.Histograms(tag)]
    return found


def test_both_packages_train_alike_and_log_alike(tmp_path: Path) -> None:
    states, logged, plain = [], [], []
    for package in (lightning.pytorch, other):
        folder = tmp_path / package.__name__
        module, callbacks = make_module(package), both()
        logger = package.loggers.TensorBoardLogger(folder, name=None, version=0)
        trainer = make_trainer(package, folder, callbacks, logger=logger, accumulate_grad_batches=2)
        trainer.fit(module)
        assert callbacks[0].controller.importance.steps == trainer.global_step == 4
        assert hooks_of(module) == hooks_of(make_module(package))
        states.append(lora_state(module))
        logged.append(curves(folder / "version_0"))
        vanilla = make_module(package)
        make_trainer(package, folder, [], accumulate_grad_batches=2).fit(vanilla)
        plain.append(lora_state(vanilla))
    assert_equal_states(states[0], states[1])
    assert_equal_states(plain[0], plain[1])
    assert any(not torch.equal(value, plain[0][name]) for name, value in states[0].items())
    assert logged[0] == logged[1]
    assert {"gates/step_scale_deviation", "responsiveness_of_channels/layer_01"} <= logged[0].keys()


def test_checkpoints_of_the_other_package(tmp_path: Path) -> None:
    whole, module = make_module(other), make_module(other)
    make_trainer(other, tmp_path, both(), max_epochs=2).fit(whole)
    trainer = make_trainer(other, tmp_path, both(), max_epochs=1)
    trainer.fit(make_module(other))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    callbacks = both()
    make_trainer(other, tmp_path, callbacks, max_epochs=2).fit(module, ckpt_path=tmp_path / "one.ckpt")
    assert callbacks[0].controller.importance.steps == 8
    assert_equal_states(lora_state(module), lora_state(whole))


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_the_learning_rate_finder_of_the_other_package(tmp_path: Path) -> None:
    losses = []
    for package in (lightning.pytorch, other):
        module, callbacks = make_module(package), both(0.25)
        trainer = make_trainer(package, tmp_path, callbacks)
        finder = package.tuner.Tuner(trainer).lr_find(module, num_training=4, min_lr=1e-3, update_attr=False)
        losses.append(finder.results["loss"])
        assert callbacks[0].controller is None
        assert hooks_of(module) == hooks_of(make_module(package))
    assert losses[0] == losses[1]


@PACKAGES
def test_refusals(tmp_path: Path, package: Any) -> None:
    module = make_module(package, target_modules=["q_proj"])
    with pytest.raises(DiscoveryError, match="none of the model's 2 gates has LoRA"):
        make_trainer(package, tmp_path, both()).fit(module)
    assert module.losses == []


def test_a_strategy_of_the_other_package_is_refused_by_name() -> None:
    from na_lora_lightning.callbacks.supported import require_supported_strategy

    class Sharded:
        strategy = other.strategies.FSDPStrategy.__new__(other.strategies.FSDPStrategy)

    with pytest.raises(UpdateError, match="FSDPStrategy"):
        require_supported_strategy(Sharded())  # type: ignore[arg-type]


def test_modules_and_trainers_of_two_packages_do_not_mix(tmp_path: Path) -> None:
    """Lightning itself says so."""
    with pytest.raises(TypeError, match="`model` must be a `LightningModule`"):
        make_trainer(other, tmp_path, both()).fit(make_module(lightning.pytorch))


def test_a_callback_alone_has_to_stand_in_a_list(tmp_path: Path) -> None:
    """The other package knows a callback outside of a list by its class, and fails at once."""
    with pytest.raises(TypeError, match="'GateImportanceCallback' object is not iterable"):
        make_trainer(other, tmp_path, GateImportanceCallback())
    make_trainer(lightning.pytorch, tmp_path, GateImportanceCallback())
