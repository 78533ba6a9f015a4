"""What the two callbacks share: finding the model, one controller for both, and the trainer's life cycle."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from na_lora_lightning.callbacks import monitor
from na_lora_lightning.callbacks.strategies import reduce_over_processes, require_supported_strategy
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery import discover_gates
from na_lora_lightning.core.importance import TemporalImportance
from na_lora_lightning.core.lora_layers import is_lora_layer
from na_lora_lightning.core.metrics import misalignment_metrics
from na_lora_lightning.core.statistics import ObserverOptions
from na_lora_lightning.core.step_scale import StepScale
from na_lora_lightning.errors import ConfigurationError, DiscoveryError

# Both callbacks of a fit join the controller of their LightningModule, in whichever order they come.
_controllers: WeakKeyDictionary[LightningModule, tuple[GateController, GateCallback]] = WeakKeyDictionary()


def find_peft_model(pl_module: nn.Module) -> nn.Module:
    """Finds the model with LoRA anywhere inside a LightningModule.

    Args:
        pl_module: The module to search.

    Returns:
        Its only ``PeftModel``, or the outermost Hugging Face model that holds LoRA layers.

    Raises:
        DiscoveryError: There is none.
        ConfigurationError: There are several.
    """
    peft_models = [m for m in pl_module.modules() if hasattr(m, "peft_config") and hasattr(m, "get_base_model")]
    if len(peft_models) > 1:
        raise ConfigurationError(
            f"{type(pl_module).__name__} holds {len(peft_models)} PEFT models, so whose gates are meant is unclear; "
            "keep one of them as a registered submodule."
        )
    if peft_models:
        return peft_models[0]
    for module in pl_module.modules():
        if hasattr(module, "config") and any(is_lora_layer(inner) for inner in module.modules()):
            return module
    raise DiscoveryError(
        f"{type(pl_module).__name__} holds no PEFT model; wrap the network with peft.get_peft_model(...) and assign it "
        "to an attribute of the LightningModule (not inside a plain list or dict) before fit."
    )


class GateCallback(Callback, ABC):
    """Base of the two callbacks.

    Args:
        observer: What the statistics look at; the same for both callbacks of a trainer.
        allow_unmasked_gates: Accept that some gates have no LoRA.
        example_inputs: Keyword arguments of one small forward pass, for models that take more than text; by default
            the LightningModule's attribute ``example_inputs``, where it has one.
    """

    def __init__(
        self,
        observer: ObserverOptions,
        allow_unmasked_gates: bool,
        example_inputs: Mapping[str, Any] | None,
    ) -> None:
        self._observer = observer
        self._allow_unmasked_gates = allow_unmasked_gates
        self._example_inputs = example_inputs
        self._pending_state: dict[str, Any] | None = None
        self._mechanism: TemporalImportance | StepScale | None = None
        self._logs_this_step = False
        self._step_to_log = 0
        self.controller: GateController | None = None

    @abstractmethod
    def _set_mechanism(self, controller: GateController) -> TemporalImportance | StepScale:
        """Turns this callback's mechanism on."""

    @abstractmethod
    def _log(self, trainer: Trainer, controller: GateController, step: int) -> None:
        """Writes this callback's metrics."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the gates and checks everything that can be checked before training."""
        require_supported_strategy(trainer)
        if pl_module not in _controllers:
            _controllers[pl_module] = (self._make_controller(trainer, pl_module), self)
        controller, first = _controllers[pl_module]
        self._require_same_settings(first, pl_module)
        self.controller = controller
        self._mechanism = self._set_mechanism(controller)
        controller.optimizer_of_gates(trainer.optimizers)
        if self._pending_state is not None:
            self._restore(self._pending_state)
            self._pending_state = None

    def _require_same_settings(self, first: GateCallback, pl_module: LightningModule) -> None:
        for name in ("observer", "allow_unmasked_gates", "example_inputs"):
            if getattr(self, f"_{name}") != getattr(first, f"_{name}"):
                _controllers.pop(pl_module)
                raise ConfigurationError(
                    f"the two NA-LoRA callbacks find and observe gates together and were given different values of "
                    f"{name}; give both the same."
                )

    def _make_controller(self, trainer: Trainer, pl_module: LightningModule) -> GateController:
        model = find_peft_model(pl_module)
        example_inputs = self._example_inputs
        if example_inputs is None:
            # A module that knows what its model takes says so.
            example_inputs = getattr(pl_module, "example_inputs", None)
        gates = discover_gates(model, example_inputs).require(self._allow_unmasked_gates)
        return GateController(model, gates, self._observer, reduce_over_processes(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the hooks on model and optimizer, once for both callbacks."""
        assert self.controller is not None
        if not self.controller.is_attached:
            self.controller.attach(trainer.optimizers)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Decides whether this step is logged, and so measured for selection misalignment."""
        assert self.controller is not None
        self._logs_this_step = trainer._logger_connector.should_update_logs and bool(trainer.loggers)
        self._step_to_log = trainer.fit_loop.epoch_loop._batches_that_stepped
        self.controller.meter.enabled = self._logs_this_step
        # Modules that compute the loss themselves call the model without labels.
        self.controller.observer.labels = batch.get("labels") if isinstance(batch, Mapping) else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, logs it if it is a logging step."""
        assert self.controller is not None
        if trainer.fit_loop._should_accumulate():
            return
        self.controller.discard_unstepped()
        if self._logs_this_step:
            self._log(trainer, self.controller, self._step_to_log)
            # The first of the callbacks writes the measurement that belongs to neither.
            monitor.write(trainer, misalignment_metrics(self.controller), self._step_to_log)
            self.controller.misalignment = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the hooks off."""
        self._release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Takes the hooks off when training fails."""
        self._release(pl_module)

    def _release(self, pl_module: LightningModule) -> None:
        _controllers.pop(pl_module, None)
        if self.controller is not None:
            self.controller.detach()

    def state_dict(self) -> dict[str, Any]:
        """State of the mechanism: tensors and plain values."""
        if self._mechanism is None or self.controller is None:
            return self._pending_state or {}
        return {
            "mechanism": self._mechanism.state_dict(),
            "forward_passes": self.controller.observer.forward_passes,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state, at once or at the start of fit."""
        if not state_dict:
            return
        if self._mechanism is None or self.controller is None or not self.controller.is_attached:
            self._pending_state = state_dict
        else:
            self._restore(state_dict)

    @torch.no_grad()
    def _restore(self, state: dict[str, Any]) -> None:
        assert self._mechanism is not None
        assert self.controller is not None
        self._mechanism.load_state_dict(state["mechanism"])
        self.controller.observer.forward_passes = int(state["forward_passes"])
