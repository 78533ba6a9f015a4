"""What the two callbacks share: the first of a trainer leads the fit's session, and each turns its mechanism on."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from textwrap import indent
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from na_lora_lightning.callbacks.model_search import explain_missing_parameters
from na_lora_lightning.callbacks.monitor import GateMonitor
from na_lora_lightning.callbacks.session import GateSession, GateSettings
from na_lora_lightning.callbacks.supported import require_supported_strategy
from na_lora_lightning.callbacks.tuner_sweeps import Sweep, batches_shown, follow_sweeps, leave_sweeps
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.in_force import say
from na_lora_lightning.core.mechanisms.mechanism import Mechanism
from na_lora_lightning.core.mechanisms.saved_options import in_words
from na_lora_lightning.errors import ConfigurationError

_Callback = TypeVar("_Callback", bound="type[GateCallback]")


def explains(options: type) -> Callable[[_Callback], _Callback]:
    """Puts what a class of options says of its fields into the ``Args`` of a callback that takes them one by one."""

    def explained(callback: _Callback) -> _Callback:
        place = f"        (those of {options.__name__})\n"
        if callback.__doc__ and options.__doc__:
            fields = inspect.cleandoc(options.__doc__).partition("Attributes:\n")[2].partition("\n\n")[0]
            callback.__doc__ = callback.__doc__.replace(place, indent(fields.rstrip() + "\n", " " * 4))
        return callback

    return explained


class GateCallback(Callback, ABC):
    """Base of the two callbacks.

    Args:
        settings: How gates are found and observed.
    """

    def __init__(self, settings: GateSettings) -> None:
        self.settings = settings
        self._pending_state: dict[str, Any] | None = None
        self._state_before_run: dict[str, Any] | None = None
        self._forget_fit()

    def _forget_fit(self) -> None:
        self._session: GateSession | None = None
        self._mechanism: Mechanism | None = None

    @abstractmethod
    def _turn_on(self, controller: GateController) -> Mechanism:
        """Turns this callback's mechanism on."""

    def _after_step(self, trainer: Trainer, controller: GateController, step: int) -> None:
        """Called after every optimizer step."""

    @property
    def controller(self) -> GateController | None:
        """Of the fit under way, or of the last one, whose hooks are off."""
        return None if self._session is None else self._session.controller

    @property
    def _is_fitting(self) -> bool:
        return self._session is not None and self._session.is_under_way

    def _fitted(self) -> GateSession:
        if self._session is None or not self._session.is_under_way:
            raise ConfigurationError(
                f"{type(self).__name__} was added to the trainer after fit began, so the gates are not hooked; pass it "
                "to Trainer(callbacks=[...]) or return it from configure_callbacks."
            )
        return self._session

    def _led(self, trainer: Trainer) -> GateSession | None:
        """The session, where this callback leads it: the first of the trainer's."""
        session = self._fitted()
        return session if gate_callbacks(trainer)[0] is self else None

    def _led_fit(self, trainer: Trainer) -> GateSession | None:
        """The same, where a fit is under way."""
        return self._led(trainer) if self._is_fitting else None

    @property
    def monitor(self) -> GateMonitor | None:
        """What shows the fit under way, or the last one."""
        return None if self._session is None else self._session.monitor

    # ---- a run of the trainer ----

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Follows the finders of the tuner, whose sweeps begin before everything else."""
        self._state_before_run = self._pending_state
        if stage == "fit":
            require_supported_strategy(trainer)
            follow_sweeps(trainer, _sweep_with_gates)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the gates and checks everything that can be checked before training."""
        callbacks = gate_callbacks(trainer)
        if callbacks[0] is self:
            begin_session(trainer, pl_module, callbacks).watch(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the hooks off, and warns of what never acted."""
        self._end(trainer, ran_its_course=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the hooks off, where fit ended before training."""
        self._end_run(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Takes the hooks off when training fails."""
        if trainer.state.fn == "fit" and not self._is_fitting:
            explain_missing_parameters(pl_module, exception)
        self._end_run(trainer, f"stopped by {type(exception).__name__}")

    def _end_run(self, trainer: Trainer, outcome: str = "stopped") -> None:
        if trainer.state.fn == "fit":
            self._end(trainer, outcome=outcome)
            leave_sweeps(trainer.callbacks)  # type: ignore[attr-defined]
        if self._pending_state is not None:
            # Of a checkpoint that was loaded to validate, say, which the next fit must not begin with.
            self._pending_state = self._state_before_run

    def _end(self, trainer: Trainer, *, ran_its_course: bool = False, outcome: str = "stopped") -> None:
        if self._session is not None and self._session.is_under_way:
            self._session.end(trainer, ran_its_course=ran_its_course, outcome=outcome)

    # ---- training ----

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the hooks on model and optimizer, and says what is in force."""
        if session := self._led(trainer):
            session.start(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Decides whether this step is logged, and so measured for selection misalignment."""
        if session := self._led(trainer):
            session.begin_batch(trainer, batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, logs it if it is a logging step."""
        if session := self._led(trainer):
            step = session.end_batch(trainer, pl_module)
            if step is not None:
                for callback in gate_callbacks(trainer):
                    callback._after_step(trainer, session.controller, step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks away: validation may compute gradients of its own."""
        if self._is_fitting:
            self._fitted().look(False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at training again."""
        if self._is_fitting:
            self._fitted().look(True)
        if session := self._led_fit(trainer):
            session.show_validation(trainer, pl_module)

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """State of the mechanism: tensors and plain values."""
        if self._mechanism is None or self.controller is None or self._pending_state is not None:
            return self._pending_state or {}
        return self.controller.mechanisms.state_of(self._mechanism)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Says so where a fit resumes from a checkpoint that was trained without this callback."""
        if trainer.state.fn == "fit" and self.state_key not in checkpoint.get("callbacks", {}):
            rank_zero_warn(
                f"the checkpoint holds no state of {self.state_key}, because it was trained without it; its statistics "
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

    def _restore(self, state: dict[str, Any]) -> None:
        assert self._mechanism is not None
        changes = self._fitted().controller.load_state_of(self._mechanism, state)
        if changes:
            name = type(self).__name__
            say(f"{name} resumes with other options than the checkpoint's: {in_words(changes)}.")

    def _join(self, session: GateSession) -> None:
        self._session = session
        self._mechanism = self._turn_on(session.controller)

    def _restore_pending(self) -> None:
        if self._pending_state is not None:
            self._restore(self._pending_state)
            self._pending_state = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy, also one for another process, has the settings and what it is to resume from, and no model."""
        copied = object.__new__(type(self))
        # Lightning leaves the LightningModule's own methods on a callback.
        copied.__dict__.update({name: value for name, value in vars(self).items() if name not in ("log", "log_dict")})
        copied._forget_fit()
        return vars(copied)


def gate_callbacks(trainer: Trainer) -> list[GateCallback]:
    """The NA-LoRA callbacks of a trainer, in its order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, GateCallback)]  # type: ignore[attr-defined]


def begin_session(trainer: Trainer, pl_module: LightningModule, callbacks: list[GateCallback]) -> GateSession:
    """Finds the gates for all callbacks, and turns their mechanisms on."""
    for callback in callbacks:
        # Of a fit that ended without telling its callbacks.
        callback._end(trainer)
        callback._forget_fit()
    session = GateSession(trainer, pl_module, [callback.settings for callback in callbacks])
    for callback in callbacks:
        callback._join(session)
    session.begin(trainer, pl_module)
    for callback in callbacks:
        callback._restore_pending()
    return session


def _sweep_with_gates(sweep: Sweep, trainer: Trainer, pl_module: LightningModule) -> None:
    """Runs a finder's sweep as the callbacks would have trained, on statistics that are dropped afterwards.

    Raises:
        ConfigurationError: The callbacks cannot follow the sweep.
    """
    callbacks = gate_callbacks(trainer)
    if trainer.state.fn != "fit" or not callbacks or any(callback._is_fitting for callback in callbacks):
        # In the middle of a fit the hooks are on, and Lightning restores the callbacks' state itself.
        sweep(trainer, pl_module)
        return
    states = [(callback, callback._pending_state) for callback in callbacks]
    try:
        session = begin_session(trainer, pl_module, callbacks)
        # It is said of the fit, which begins afterwards.
        session.controller.announced = True
        session.start(trainer)
        with batches_shown(pl_module, session.show_labels):
            sweep(trainer, pl_module)
    finally:
        for callback, state in states:
            callback._end(trainer)
            callback._forget_fit()
            callback._pending_state = state
