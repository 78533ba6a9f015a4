"""The gates of one fit: one controller for all NA-LoRA callbacks of a trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from na_lora_lightning.callbacks.model_search import find_peft_model
from na_lora_lightning.callbacks.monitor import GateMonitor
from na_lora_lightning.callbacks.supported import (
    in_training_dtype,
    is_true_in_any_process,
    probing_precision,
    reduce_over_processes,
    require_reachable_rows,
    require_whole_closure,
)
from na_lora_lightning.callbacks.view_options import ViewOptions
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.core.stepping.optimizers import stepping_optimizer
from na_lora_lightning.errors import ConfigurationError, UpdateError
from na_lora_lightning.lightning_internals import is_step_to_log, logged_step, planned_steps, require_progress

# Answers of each validation that are shown.
_SAMPLES = 5


@dataclass(frozen=True)
class GateSettings:
    """How gates are found and observed; the same for both callbacks of a trainer.

    Attributes:
        observer: What the statistics look at.
        allow_unmasked_gates: Accept that some gates have no LoRA instead of stopping with their names.
        example_inputs: Keyword arguments of one small forward pass, for models that take more than text; by default
            the LightningModule's attribute ``example_inputs``, where it has one.
        view: What is shown, beside the curves over all layers.
    """

    observer: ObserverOptions
    allow_unmasked_gates: bool
    example_inputs: Mapping[str, Any] | None
    view: ViewOptions = ViewOptions()

    def __post_init__(self) -> None:
        if self.example_inputs is not None and not isinstance(self.example_inputs, Mapping):
            raise ConfigurationError(
                f"example_inputs is a {type(self.example_inputs).__name__}, which does not name the arguments; give a "
                "dictionary of keyword arguments for one small forward pass."
            )


class NonFiniteGateWarning(UserWarning):
    """A gate had pre-activations that are NaN or infinite."""


class GateSession:
    """Finds the gates of a LightningModule and follows its training.

    Args:
        trainer: Whose fit begins.
        pl_module: What it trains.
        settings: Of all NA-LoRA callbacks of the trainer, which must agree.

    Attributes:
        controller: Its hooks are on from :meth:`start` to :meth:`end`.
        is_under_way: Whether the fit is between :meth:`begin` and :meth:`end`.
        monitor: Shows what the gates do; None in a sweep of a tuner.

    Raises:
        ConfigurationError: The settings differ, or the module has not one PEFT model.
        DiscoveryError: No gate was found, or one has no LoRA.
        UpdateError: The update of the gates' rows cannot be reached.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, settings: list[GateSettings]) -> None:
        require_reachable_rows(trainer)
        require_progress(trainer)
        _require_same(settings)
        chosen = settings[0]
        example_inputs = chosen.example_inputs
        if example_inputs is None:
            # A module that knows what its model takes says so.
            of_module = getattr(pl_module, "example_inputs", None)
            example_inputs = of_module if isinstance(of_module, Mapping) else None
        model = find_peft_model(pl_module)
        with probing_precision(trainer):
            inputs = example_inputs and in_training_dtype(trainer, example_inputs)
            gates = discover_gates(model, inputs).require(chosen.allow_unmasked_gates)
        self.controller = GateController(model, gates, chosen.observer, reduce_over_processes(trainer))
        self.monitor: GateMonitor | None = None
        self._view = chosen.view
        self.is_under_way = False
        self._logs_next_step = False
        self._step_to_log = 0
        self._steps_before_batch = (0, 0)
        # What is measured is added over processes, so all measure where only one of them has a logger.
        self._is_logged = is_true_in_any_process(trainer, bool(trainer.loggers))

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the optimizer that steps the gates' rows, once all mechanisms are on.

        Raises:
            ConfigurationError: Its closure does not run the whole training step.
            UpdateError: There is none.
        """
        self._optimizer = self.controller.optimizer_of_gates(trainer.optimizers)
        require_whole_closure(trainer, pl_module, self._optimizer)
        self.is_under_way = True

    def watch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Has the fit shown; called in every process, after :meth:`begin`."""
        self.monitor = GateMonitor(trainer, pl_module, self.controller, self._view)
        shows = bool(trainer.loggers) or self.monitor.keeps_history
        self._is_logged = is_true_in_any_process(trainer, shows)

    def start(self, trainer: Trainer) -> None:
        """Puts the hooks on model and optimizer, and says what is in force."""
        self.controller.attach(trainer.optimizers)
        self.controller.total_steps = planned_steps(trainer)
        self.controller.announce()
        if self.monitor is not None:
            self.monitor.start(trainer)

    def begin_batch(self, trainer: Trainer, batch: Any) -> None:
        """Decides whether the coming step is logged, and so measured for selection misalignment."""
        if not any(stepping_optimizer(optimizer) is self._optimizer for optimizer in trainer.optimizers):
            raise UpdateError(
                "the trainer's optimizers were replaced after training began, so the steps of the gates' rows cannot "
                "be reached; make the final optimizer in configure_optimizers."
            )
        self._steps_before_batch = (trainer.global_step, self.controller.steps)
        # A manual optimization may step some batches later.
        self._logs_next_step = self._logs_next_step or (self._is_logged and is_step_to_log(trainer))
        self._step_to_log = logged_step(trainer)
        self.controller.meter.enabled = self._logs_next_step
        if self._logs_next_step and self.monitor is not None:
            self.monitor.before_step(trainer)
        self.show_labels(batch)

    def show_labels(self, batch: Any) -> None:
        """Lets the observer see the targets: modules that compute the loss themselves call the model without labels."""
        self.controller.observer.labels = batch.get("labels") if isinstance(batch, Mapping) else None

    def end_batch(self, trainer: Trainer, pl_module: LightningModule) -> int | None:
        """Writes the curves where they are due.

        Returns:
            The step under which loggers show it, where the optimizer stepped; else None.
        """
        controller = self.controller
        trainer_steps, steps = self._steps_before_batch
        if pl_module.automatic_optimization and trainer.global_step != trainer_steps:
            # In a manual optimization another optimizer may have stepped, or none on purpose.
            controller.discard_unstepped()
        if controller.steps == steps:
            return None
        if self._logs_next_step:
            self._logs_next_step = False
            if self.monitor is not None:
                self.monitor.write_step(trainer, self._step_to_log)
            controller.misalignment = None
            _warn_of_nonfinite(controller.observer.take_nonfinite(), self._step_to_log)
        return self._step_to_log

    def show_validation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what a validation within the fit measured, with the answers that its module keeps."""
        if self.monitor is None:
            return
        answers = list(getattr(getattr(pl_module, "evaluator", None), "answers", ()))[:_SAMPLES]
        self.monitor.write_validation(trainer, [asdict(answer) for answer in answers])

    def look(self, enabled: bool) -> None:
        """Looks at forward passes, or away from those of a validation that computes gradients of its own."""
        self.controller.observer.enabled = enabled

    def end(self, trainer: Trainer, *, ran_its_course: bool, outcome: str = "stopped") -> None:
        """Takes the hooks off, and warns of what never acted."""
        if self.monitor is not None:
            self.monitor.end(trainer, "ended" if ran_its_course else outcome)
        # A dry run (``fast_dev_run``) trains nothing that anybody keeps.
        if ran_its_course and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.controller.conclude()
        self.is_under_way = False
        self.controller.detach()


def _require_same(settings: list[GateSettings]) -> None:
    first = settings[0]
    for other in settings[1:]:
        for name in ("observer", "allow_unmasked_gates", "example_inputs", "view"):
            if not _are_same(getattr(first, name), getattr(other, name)):
                raise ConfigurationError(
                    "the two NA-LoRA callbacks find and observe gates together and were given different values of "
                    f"{name}; give both the same."
                )


def _are_same(first: Any, second: Any) -> bool:
    """Equality of settings, tensors among them."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return isinstance(first, Tensor) and isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_are_same(value, second[name]) for name, value in first.items())
    return bool(first == second)


def _warn_of_nonfinite(names: list[str], step: int) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        rank_zero_warn(
            f"the gate {names[0]!r}{more} had NaN or infinite pre-activations until optimizer step {step}, and those "
            "steps are left out of its statistics; lower the learning rate, or look at the data and the precision.",
            category=NonFiniteGateWarning,
        )
