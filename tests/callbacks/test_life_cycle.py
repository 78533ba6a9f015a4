"""What the two callbacks leave behind: after every end of a run, and in copies."""

from __future__ import annotations

import copy
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from foreign_modules import Validated
from lightning.pytorch import Callback
from lightning_models import (
    ForeignModule,
    assert_equal_states,
    both,
    fitted_alone,
    hooks_of,
    loader,
    lora_state,
    make_trainer,
)

from na_lora_lightning import GateImportanceCallback
from na_lora_lightning.errors import ConfigurationError, UpdateError

# ---- runs that are no fit ----


def test_validate_test_and_predict_have_no_hooks(tmp_path: Path) -> None:
    callbacks, module = both(), Validated()
    trainer = make_trainer(tmp_path, callbacks=callbacks)
    clean = hooks_of(module)
    for run in (trainer.validate, trainer.test, trainer.predict):
        run(module, loader(2), **({} if run == trainer.predict else {"verbose": False}))
        assert hooks_of(module) == clean
        assert callbacks[0].controller is None
        assert callbacks[0].state_dict() == {}


def test_a_checkpoint_that_was_evaluated_does_not_start_the_next_fit(tmp_path: Path) -> None:
    callbacks = both()
    trainer = make_trainer(tmp_path, callbacks=callbacks)
    trainer.fit(Validated(), loader(), loader(1))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for run in (trainer.validate, trainer.test):
        run(Validated(), loader(1), ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=True)
    module = ForeignModule()
    make_trainer(tmp_path, callbacks=callbacks).fit(module, loader())
    assert callbacks[0].controller.importance.steps == 8
    assert_equal_states(lora_state(module), fitted_alone())


def test_a_checkpoint_without_the_callback_is_named(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, callbacks=both()[1:], max_epochs=1)
    trainer.fit(ForeignModule(), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    callbacks = both()
    with pytest.warns(UserWarning, match="holds no state of GateImportanceCallback, because it was trained without"):
        make_trainer(tmp_path, callbacks=callbacks).fit(
            ForeignModule(), loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
        )
    controller = callbacks[0].controller
    assert (controller.importance.steps, controller.step_scale.steps) == (4, 8)


def test_a_fit_of_no_steps(tmp_path: Path) -> None:
    for options in ({"max_steps": 0}, {"max_epochs": 0}, {"limit_train_batches": 0}):
        callbacks, module = both(), ForeignModule()
        make_trainer(tmp_path, callbacks=callbacks, **options).fit(module, loader())
        assert callbacks[0].controller.steps == 0
        assert hooks_of(module) == hooks_of(ForeignModule())


def test_sanity_validation_is_not_counted(tmp_path: Path) -> None:
    callbacks, module = both(), Validated()
    trainer = make_trainer(tmp_path, callbacks=callbacks, num_sanity_val_steps=-1, limit_val_batches=3, max_epochs=1)
    trainer.fit(module, loader(), loader())
    assert module.validations == 3 + 3
    assert callbacks[0].controller.observer.forward_passes == 4


# ---- several fits ----


def test_two_modules_with_the_same_callbacks(tmp_path: Path) -> None:
    callbacks = both()
    for kind in ("gpt2", "llama"):
        module = ForeignModule(kind)
        make_trainer(tmp_path, callbacks=callbacks).fit(module, loader(kind=kind))
        assert_equal_states(lora_state(module), fitted_alone(kind))


def test_a_trainer_that_fits_twice(tmp_path: Path) -> None:
    callbacks = both()
    trainer = make_trainer(tmp_path, callbacks=callbacks)
    module = ForeignModule()
    trainer.fit(module, loader())
    clean = hooks_of(module)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, loader())
    # Statistics start over with each fit.
    assert trainer.global_step == 16
    assert callbacks[0].controller.importance.steps == 8
    assert hooks_of(module) == clean


# ---- ends before the end ----


class Fails(Callback):
    """Raises in one of its hooks."""

    def __init__(self, hook: str, error: BaseException) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise error

        setattr(self, hook, fail)


@pytest.fixture
def _interrupt_signal() -> Iterator[None]:
    """Lightning ignores the signal after a first interrupt."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("_interrupt_signal")
@pytest.mark.parametrize(
    ("hook", "error", "seen"),
    [
        ("on_fit_start", RuntimeError, RuntimeError),
        ("on_train_start", RuntimeError, RuntimeError),
        ("on_before_optimizer_step", RuntimeError, RuntimeError),
        ("on_validation_end", RuntimeError, RuntimeError),
        ("on_train_batch_start", KeyboardInterrupt, SystemExit),
    ],
)
def test_no_hook_stays_after_an_error(tmp_path: Path, hook: str, error: Any, seen: Any) -> None:
    callbacks, module = both(), Validated()
    clean = hooks_of(module)
    trainer = make_trainer(tmp_path, callbacks=[*callbacks, Fails(hook, error())], num_sanity_val_steps=0)
    with pytest.raises(seen):
        trainer.fit(module, loader(), loader(1))
    assert hooks_of(module) == clean
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    # And the next fit is not touched by what this one left.
    again = ForeignModule()
    make_trainer(tmp_path, callbacks=callbacks).fit(again, loader())
    assert_equal_states(lora_state(again), fitted_alone())


# ---- what would train without the method ----


class AddsLate(Callback):
    def __init__(self, added: Callback) -> None:
        self.added = added

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.callbacks = [*trainer.callbacks, self.added]


def test_a_callback_that_is_added_after_fit_began_is_refused(tmp_path: Path) -> None:
    importance = GateImportanceCallback()
    make_trainer(tmp_path, callbacks=[importance], fast_dev_run=True).fit(ForeignModule(), loader())
    with pytest.raises(ConfigurationError, match="GateImportanceCallback was added to the trainer after fit began"):
        make_trainer(tmp_path, callbacks=[AddsLate(importance)]).fit(ForeignModule(), loader())


def test_callbacks_from_the_module_itself(tmp_path: Path) -> None:
    class Own(ForeignModule):
        def configure_callbacks(self) -> Any:
            return both()

    module = Own()
    make_trainer(tmp_path).fit(module, loader())
    assert_equal_states(lora_state(module), fitted_alone())


def test_optimizers_that_are_replaced_are_refused(tmp_path: Path) -> None:
    class Replaces(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                trainer.optimizers = [pl_module.configure_optimizers()["optimizer"]]

    with pytest.raises(UpdateError, match="optimizers were replaced after training began"):
        make_trainer(tmp_path, callbacks=[*both(), Replaces()]).fit(ForeignModule(), loader())


# ---- copies ----


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), lambda c: cloudpickle.loads(cloudpickle.dumps(c))],
)
def test_copies_have_the_settings_and_no_model(tmp_path: Path, copied: Any) -> None:
    used = both()
    make_trainer(tmp_path, callbacks=used).fit(ForeignModule(), loader())
    for callbacks in (both(), used):
        copies = copied(callbacks)
        assert len(pickle.dumps(copies)) < 2000
        assert copies[0].controller is None
        assert copies[0].options == callbacks[0].options
        module = ForeignModule()
        make_trainer(tmp_path, callbacks=copies).fit(module, loader())
        assert_equal_states(lora_state(module), fitted_alone())
    assert used[0].controller.importance.steps == 8


def test_a_copy_resumes_from_what_the_original_was_given() -> None:
    state = {"mechanism": {"steps": 3}, "forward_passes": 5}
    callback = GateImportanceCallback()
    callback.load_state_dict(state)
    assert copy.deepcopy(callback).state_dict() == state


def test_a_module_that_is_copied_in_training(tmp_path: Path) -> None:
    class Copies(Callback):
        """Trains the copy on its own, as some averaging callbacks do, and so must not be observed."""

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            copied = copy.deepcopy(pl_module.network)
            copied["language"](**batch).loss.backward()

    callbacks, module = both(), ForeignModule()
    make_trainer(tmp_path, callbacks=[*callbacks, Copies()]).fit(module, loader())
    assert callbacks[0].controller.observer.forward_passes == 8
    assert_equal_states(lora_state(module), fitted_alone())
