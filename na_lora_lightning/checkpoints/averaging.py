"""Callbacks of Lightning that keep or change copies of the weights, on models whose base is frozen and not saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.lightning_internals import averaged_model

# Where Lightning's callback puts the weights that train, as the averaged ones take their place.
CURRENT_STATE = "current_model_state"
_AVERAGES = "averaging_state"

_UNSUITABLE: dict[type[Any], str] = {
    StochasticWeightAveraging: "it copies the model before that is loaded, and so averages nothing; use "
    "WeightAveraging or EMAWeightAveraging",
    ModelPruning: "it prunes the weights of the base model, which are not in the adapter; leave it out",
    BackboneFinetuning: "it trains the weights of a backbone, which LoRA keeps frozen; leave it out, or name more "
    "layers in lora.target_modules",
}


class AdapterAverage(AveragedModel):
    """Averages the parameters that train, and leaves the others alone.

    Averages of equal values are not always equal to them, and so a frozen weight, above all in 16 bits, would drift
    away from itself, and an index in a buffer become another one.
    """

    @override
    def update_parameters(self, model: nn.Module) -> None:
        """Takes the current parameters into the averages; an element that equals its average stays bit by bit.

        Args:
            model: What trains.
        """
        averages, current = (
            nn.ParameterList(parameter for parameter in module.parameters() if parameter.requires_grad)
            for module in (self.module, model)
        )
        before = [average.detach().clone() for average in averages]
        copied, self.module = self.module, averages
        try:
            super().update_parameters(current)
        finally:
            self.module = copied
        with torch.no_grad():
            for average, former, now in zip(averages, before, current, strict=True):
                average.copy_(torch.where(former == now.to(former.device), former, average))
            for kept, buffer in zip(copied.buffers(), model.buffers(), strict=True):
                kept.copy_(buffer)


def require_suitable_callbacks(trainer: Trainer) -> None:
    """Refuses callbacks that would change or store the base model.

    Args:
        trainer: Before its run.

    Raises:
        ConfigurationError: There is one, and a fit is to begin.
    """
    if trainer.state.fn != "fit":
        return
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, reason in _UNSUITABLE.items():
            if isinstance(callback, kind):
                raise ConfigurationError(f"{kind.__name__} does not work with LoRA: {reason}.")


def average_adapter_alone(trainer: Trainer, module: LightningModule) -> None:
    """Has the averages that callbacks keep of a module be of its adapter.

    Args:
        trainer: At the start of fit.
        module: The module, with the model in it.
    """
    for callback in weight_averaging(trainer):
        average = averaged_model(callback)
        average.__class__ = AdapterAverage
        for copied, parameter in zip(average.module.parameters(), module.parameters(), strict=True):
            # There is no need for a second base model.
            if not parameter.requires_grad and copied.device == parameter.device:
                copied.data = parameter.data


def weight_averaging(trainer: Trainer) -> list[WeightAveraging]:
    """The callbacks that keep averages, in a trainer that fits."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, WeightAveraging)]


def restore_averages(checkpoint: dict[str, Any], base: Mapping[str, Tensor], averages_go_on: bool) -> None:
    """Makes a checkpoint with averages what a fit resumes from.

    Args:
        checkpoint: Changed in place.
        base: State dict of the module, from which the base model is taken, as Lightning loads averages of all weights.
        averages_go_on: Whether the fit averages; else it goes on with the weights that trained.
    """
    if _AVERAGES not in checkpoint:
        return
    if averages_go_on:
        checkpoint["state_dict"] = {**base, **checkpoint["state_dict"]}
    else:
        checkpoint["state_dict"] = checkpoint[CURRENT_STATE]
