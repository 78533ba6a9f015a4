"""What the two callbacks share: one controller for both, and the trainer's life cycle."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from na_lora_lightning.callbacks import monitor
from na_lora_lightning.callbacks.model_search import explain_missing_parameters, find_peft_model
from na_lora_lightning.callbacks.shared_settings import require_same_settings
from na_lora_lightning.callbacks.supported import (
    in_training_dtype,
    is_true_in_any_process,
    probing_precision,
    reduce_over_processes,
    require_reachable_rows,
    require_supported_strategy,
    require_whole_closure,
)
from na_lora_lightning.callbacks.tuner_sweeps import Sweep, batches_shown, follow_sweeps, leave_sweeps
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.in_force import say
from na_lora_lightning.core.mechanisms.importance import TemporalImportance
from na_lora_lightning.core.mechanisms.metrics import misalignment_metrics
from na_lora_lightning.core.mechanisms.saved_options import changed_options, in_words, saved_options
from na_lora_lightning.core.mechanisms.step_scale import StepScale
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.core.stepping.optimizers import stepping_optimizer
from na_lora_lightning.errors import ConfigurationError, UpdateError
from na_lora_lightning.lightning_internals import is_step_to_log, logged_step, planned_steps, require_progress

# Both callbacks of a fit join the controller of their LightningModule, in whichever order they come.
_controllers: WeakKeyDictionary[LightningModule, tuple[GateController, GateCallback]] = WeakKeyDictionary()


class NonFiniteGateWarning(UserWarning):
    """A gate had pre-activations that are NaN or infinite."""


class GateCallback(Callback, ABC):
    """Base of the two callbacks.

    Args:
        observer: What the statistics look at; the same for both callbacks of a trainer.
        allow_unmasked_gates: Accept that some gates have no LoRA.
        example_inputs: Keyword arguments of one small forward pass, for models that take more than text; by default
            the LightningModule's attribute ``example_inputs``, where it has one.

    Attributes:
        controller: Of the fit under way, or of the last one, whose hooks are off.
    """

    def __init__(
        self,
        observer: ObserverOptions,
        allow_unmasked_gates: bool,
        example_inputs: Mapping[str, Any] | None,
    ) -> None:
        if example_inputs is not None and not isinstance(example_inputs, Mapping):
            raise ConfigurationError(
                f"example_inputs is a {type(example_inputs).__name__}, which does not name the arguments; give a "
                "dictionary of keyword arguments for one small forward pass."
            )
        self._observer = observer
        self._allow_unmasked_gates = allow_unmasked_gates
        self._example_inputs = example_inputs
        self._pending_state: dict[str, Any] | None = None
        self._state_before_run: dict[str, Any] | None = None
        self._forget_fit()

    def _forget_fit(self) -> None:
        self.controller: GateController | None = None
        self._mechanism: TemporalImportance | StepScale | None = None
        self._optimizer: Optimizer | None = None
        self._is_fitting = False
        self._is_logged = False
        self._logs_next_step = False
        self._step_to_log = 0
        self._steps_before_batch = (0, 0)

    @abstractmethod
    def _set_mechanism(self, controller: GateController) -> TemporalImportance | StepScale:
        """Turns this callback's mechanism on."""

    @abstractmethod
    def _log(self, trainer: Trainer, controller: GateController, step: int) -> None:
        """Writes this callback's metrics."""

    def _after_step(self, trainer: Trainer, controller: GateController, step: int) -> None:
        """Called after every optimizer step."""

    # ---- a run of the trainer ----

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Follows the finders of the tuner, whose sweeps begin before everything else."""
        self._state_before_run = self._pending_state
        if stage == "fit":
            require_supported_strategy(trainer)
            follow_sweeps(trainer, _sweep_with_gates)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the gates and checks everything that can be checked before training."""
        require_reachable_rows(trainer)
        require_progress(trainer)
        controller, first = self._join_controller(trainer, pl_module)
        require_same_settings(vars(first), vars(self))
        self._forget_fit()
        self.controller = controller
        self._mechanism = self._set_mechanism(controller)
        self._optimizer = controller.optimizer_of_gates(trainer.optimizers)
        require_whole_closure(trainer, pl_module, self._optimizer)
        self._is_fitting = True
        # What is measured is added over processes, so all measure where only one of them has a logger.
        self._is_logged = is_true_in_any_process(trainer, bool(trainer.loggers))
        if self._pending_state is not None:
            self._restore(self._pending_state)
            self._pending_state = None

    def _join_controller(self, trainer: Trainer, pl_module: LightningModule) -> tuple[GateController, GateCallback]:
        known = _controllers.get(pl_module)
        if known is not None and known[1] not in trainer.callbacks:  # type: ignore[attr-defined]
            # Left behind by a fit that ended without telling its callbacks.
            known[0].detach()
            known = None
        if known is None:
            known = _controllers[pl_module] = (self._make_controller(trainer, pl_module), self)
        return known

    def _make_controller(self, trainer: Trainer, pl_module: LightningModule) -> GateController:
        model = find_peft_model(pl_module)
        example_inputs = self._example_inputs
        if example_inputs is None:
            # A module that knows what its model takes says so.
            of_module = getattr(pl_module, "example_inputs", None)
            example_inputs = of_module if isinstance(of_module, Mapping) else None
        with probing_precision(trainer):
            inputs = example_inputs and in_training_dtype(trainer, example_inputs)
            gates = discover_gates(model, inputs).require(self._allow_unmasked_gates)
        return GateController(model, gates, self._observer, reduce_over_processes(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the hooks off, and warns of what never acted."""
        # A dry run (``fast_dev_run``) trains nothing that anybody keeps.
        if self.controller is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.controller.conclude()
        self._release(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the hooks off, where fit ended before training."""
        self._end_run(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Takes the hooks off when training fails."""
        if trainer.state.fn == "fit" and not self._is_fitting:
            explain_missing_parameters(pl_module, exception)
        self._end_run(trainer, pl_module)

    def _end_run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._release(pl_module)
            leave_sweeps(trainer.callbacks)  # type: ignore[attr-defined]
        if self._pending_state is not None:
            # Of a checkpoint that was loaded to validate, say, which the next fit must not begin with.
            self._pending_state = self._state_before_run

    def _release(self, pl_module: LightningModule) -> None:
        _controllers.pop(pl_module, None)
        self._is_fitting = False
        if self.controller is not None:
            self.controller.detach()

    # ---- training ----

    def _fitted(self) -> GateController:
        if self.controller is None or not self._is_fitting:
            raise ConfigurationError(
                f"{type(self).__name__} was added to the trainer after fit began, so the gates are not hooked; pass it "
                "to Trainer(callbacks=[...]) or return it from configure_callbacks."
            )
        return self.controller

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the hooks on model and optimizer, once for both callbacks, and says what is in force."""
        controller = self._fitted()
        if not controller.is_attached:
            controller.attach(trainer.optimizers)
            controller.total_steps = planned_steps(trainer)
            controller.announce()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Decides whether this step is logged, and so measured for selection misalignment."""
        controller = self._fitted()
        if not any(stepping_optimizer(optimizer) is self._optimizer for optimizer in trainer.optimizers):
            raise UpdateError(
                "the trainer's optimizers were replaced after training began, so the steps of the gates' rows cannot "
                "be reached; make the final optimizer in configure_optimizers."
            )
        self._steps_before_batch = (trainer.global_step, controller.steps)
        # A manual optimization may step some batches later.
        self._logs_next_step = self._logs_next_step or (self._is_logged and is_step_to_log(trainer))
        self._step_to_log = logged_step(trainer)
        controller.meter.enabled = self._logs_next_step
        self._show_labels(batch)

    def _show_labels(self, batch: Any) -> None:
        # Modules that compute the loss themselves call the model without labels.
        self._fitted().observer.labels = batch.get("labels") if isinstance(batch, Mapping) else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, logs it if it is a logging step."""
        controller = self._fitted()
        trainer_steps, steps = self._steps_before_batch
        if pl_module.automatic_optimization and trainer.global_step != trainer_steps:
            # In a manual optimization another optimizer may have stepped, or none on purpose.
            controller.discard_unstepped()
        if controller.steps == steps:
            return
        self._after_step(trainer, controller, self._step_to_log)
        if self._logs_next_step:
            self._logs_next_step = False
            self._log(trainer, controller, self._step_to_log)
            # The first of the callbacks writes the measurement that belongs to neither.
            monitor.write(trainer, misalignment_metrics(controller), self._step_to_log)
            controller.misalignment = None
            _warn_of_nonfinite(controller.observer.take_nonfinite(), self._step_to_log)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks away: validation may compute gradients of its own."""
        self._observe(False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at training again."""
        self._observe(True)

    def _observe(self, enabled: bool) -> None:
        if self._is_fitting and self.controller is not None:
            self.controller.observer.enabled = enabled

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """State of the mechanism: tensors and plain values."""
        if self._mechanism is None or self.controller is None or self._pending_state is not None:
            return self._pending_state or {}
        return {
            "mechanism": self._mechanism.state_dict(),
            "forward_passes": self.controller.observer.forward_passes,
            "options": asdict(self._observer),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Says so where a fit goes on from a checkpoint that was trained without this callback."""
        if trainer.state.fn == "fit" and self.state_key not in checkpoint.get("callbacks", {}):
            rank_zero_warn(
                f"The checkpoint holds no state of {self.state_key}, because it was trained without it; its statistics "
                "begin at zero."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state, at once or at the start of fit."""
        if not state_dict:
            return
        if self._is_fitting:
            self._restore(state_dict)
        else:
            self._pending_state = state_dict

    @torch.no_grad()
    def _restore(self, state: dict[str, Any]) -> None:
        assert self._mechanism is not None
        assert self.controller is not None
        changes = changed_options(saved_options(state), self._observer)
        changes |= self._mechanism.load_state_dict(state["mechanism"])
        if changes:
            name = type(self).__name__
            say(f"{name} goes on with other options than the checkpoint's: {in_words(changes)}.")
        self.controller.observer.forward_passes = int(state["forward_passes"])
        self.controller.observer.reset()
        self.controller.share_gradient_mask()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, also one for another process, has the settings and what it is to resume from, and no model."""
        copied = object.__new__(type(self))
        # Lightning leaves the LightningModule's own methods on a callback.
        copied.__dict__.update({name: value for name, value in vars(self).items() if name not in ("log", "log_dict")})
        copied._forget_fit()
        return vars(copied)


def _warn_of_nonfinite(names: list[str], step: int) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        rank_zero_warn(
            f"The gate {names[0]!r}{more} had NaN or infinite pre-activations until optimizer step {step}, and those "
            "steps are left out of its statistics; lower the learning rate, or look at the data and the precision.",
            category=NonFiniteGateWarning,
        )


def _sweep_with_gates(sweep: Sweep, trainer: Trainer, pl_module: LightningModule) -> None:
    """Runs a finder's sweep as the callbacks would have trained, on statistics that are dropped afterwards.

    Raises:
        ConfigurationError: The callbacks cannot follow the sweep.
    """
    callbacks = [callback for callback in trainer.callbacks if isinstance(callback, GateCallback)]  # type: ignore[attr-defined]
    if trainer.state.fn != "fit" or not callbacks or any(callback._is_fitting for callback in callbacks):
        # In the middle of a fit the hooks are on, and Lightning restores the callbacks' state itself.
        sweep(trainer, pl_module)
        return
    states = [(callback, callback._pending_state) for callback in callbacks]
    try:
        for callback in callbacks:
            callback.on_fit_start(trainer, pl_module)
            # It is said of the fit, which begins afterwards.
            callback._fitted().announced = True
        for callback in callbacks:
            callback.on_train_start(trainer, pl_module)
        with batches_shown(pl_module, callbacks[0]._show_labels):
            sweep(trainer, pl_module)
    finally:
        for callback, state in states:
            callback._release(pl_module)
            callback._forget_fit()
            callback._pending_state = state
