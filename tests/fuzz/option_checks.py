"""What is checked of a run of ``na-lora fit``, from inside and afterwards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from na_lora_lightning.callbacks.gate_callback import GateCallback
from na_lora_lightning.core.controller import GateController


class WrongError(AssertionError):
    """A run that ended well was not right."""


class Spy(Callback):
    """Watches a fit: its losses, and that the rows that a mask holds do not move.

    Attributes:
        last: The spy of the last fit.
        losses: Of each micro-batch.
        held: Rows that were held in all steps, counted.
    """

    last: Spy

    def __init__(self) -> None:
        Spy.last = self
        self.losses: list[float] = []
        self.held = 0
        self.module: LightningModule | None = None
        self.trainer: Trainer | None = None
        self._before: list[Tensor] = []
        self._steps = 0

    @staticmethod
    def controller(trainer: Trainer) -> GateController | None:
        """That of the two callbacks, if one is there."""
        callbacks = [each for each in trainer.callbacks if isinstance(each, GateCallback)]  # type: ignore[attr-defined]
        return callbacks[0].controller if callbacks else None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.module, self.trainer = pl_module, trainer

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        controller = self.controller(trainer)
        if controller is not None:
            self._steps = controller.steps
            self._before = [rows.parameter.detach().clone() for site in controller.gates for rows in site.parameters()]

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        if outputs is not None:
            self.losses.append(float(outputs["loss"]))
        controller = self.controller(trainer)
        if controller is None or controller.importance is None or controller.steps == self._steps:
            return
        entries = [
            (site, channels, rows)
            for site, channels in zip(controller.gates, controller.layout.site_slices, strict=True)
            for rows in site.parameters()
        ]
        for before, (site, channels, rows) in zip(self._before, entries, strict=True):
            held = controller.weights[channels].view(site.networks, -1) == 0
            for network in range(site.networks):
                own = site.rows[held[network]]
                then, now = before[own], rows.parameter.detach()[own]
                if site.networks > 1:
                    # The experts of PEFT's stacked adapters alternate in the columns of B.
                    then, now = then[:, network :: site.networks], now[:, network :: site.networks]
                self.held += len(own)
                if not torch.equal(then, now):
                    raise WrongError(f"held rows of {rows.name} moved in step {controller.steps}")


def trained(module: LightningModule) -> dict[str, Tensor]:
    """Copies of everything that is trained."""
    return {name: value.detach().clone() for name, value in module.named_parameters() if value.requires_grad}


def require_equal(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Checks that two sets of weights are the same bit by bit."""
    if found.keys() != expected.keys():
        raise WrongError(f"{what}: other parameters are trained")
    for name, value in expected.items():
        if not torch.equal(found[name], value):
            raise WrongError(f"{what}: {name} differs by {(found[name] - value).abs().max().item():.3g}")


def require_finite(losses: list[float]) -> None:
    """Checks the losses of a fit; they are finite, or the fit stops or skips."""
    if not all(map(math.isfinite, losses)):
        raise WrongError("a loss is not finite")


def require_plain_adapter(base: str, module: Any) -> None:
    """Checks that PEFT alone loads the written adapter, and that its logits are the module's."""
    folder: Path | None = getattr(module, "written_adapter_folder", None)
    if folder is None:
        return
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(2, 20)[None]
    frozen = next(value for name, value in module.model.named_parameters() if "lora" not in name)
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=frozen.dtype)
    plain = PeftModel.from_pretrained(loaded, str(folder), autocast_adapter_dtype=frozen.dtype == torch.float32)
    with torch.no_grad():
        found = plain.eval()(tokens).logits.float()
        expected = module.model.eval()(tokens).logits.float()
    tolerance = 1e-4 if frozen.dtype == torch.float32 else 0.05
    difference = (found - expected).abs().max().item() / expected.abs().max().clamp(min=1e-3).item()
    if not difference < tolerance:
        raise WrongError(f"the adapter folder gives other logits, relatively by {difference:.3g}")
