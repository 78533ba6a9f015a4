"""Whether two real training steps move exactly the rows that the mask lets move."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from zoo.tiny_models import loss_of, quiet
from zoo.watching import lora_b

from na_lora_lightning.callbacks.gate_importance import GateImportanceCallback
from na_lora_lightning.callbacks.step_scale import StepScaleCallback
from na_lora_lightning.core.sites import GateMap, GateSite
from na_lora_lightning.errors import ConfigurationError

KEEP = 0.5
HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_forward_hooks_always_called", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"),
)


class Fit(LightningModule):
    """Somebody's project around the model."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = loss_of(self.model.get_base_model()(**batch))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trainable = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.1)


class Copies(Callback):
    """Keeps ``lora_B`` of the sites just before and after each optimizer step.

    Attributes:
        before: One for each site; None where it has no gradient, so that the optimizer leaves it alone.
        after: One for each site.
    """

    def __init__(self, sites: list[GateSite]) -> None:
        self._sites = sites
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []
        self.with_gradient: list[bool] = []

    def on_before_optimizer_step(self, *args: Any) -> None:
        self.before = [lora_b(site).detach().clone() for site in self._sites]
        self.with_gradient = [lora_b(site).grad is not None for site in self._sites]

    def on_train_batch_end(self, *args: Any) -> None:
        self.after = [lora_b(site).detach().clone() for site in self._sites]


def hooks_on(model: nn.Module) -> int:
    """Number of hooks on all modules and parameters, and of methods hidden by others."""
    of_modules = sum(len(getattr(module, name)) for module in model.modules() for name in HOOKS)
    hidden = sum("_apply_gate" in module.__dict__ for module in model.modules())
    return of_modules + hidden + sum(len(p._backward_hooks or ()) for p in model.parameters())


@contextmanager
def silent_lightning() -> Iterator[None]:
    """Without Lightning's remarks on the machine."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("lightning")]
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with quiet():
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def training_problems(
    model: PeftModel, gates: GateMap, batch: Mapping[str, Any], options: Mapping[str, Any], notes: list[str]
) -> list[str]:
    """Trains two steps with both callbacks and says what is wrong.

    Args:
        model: The wrapped model.
        gates: The gates whose rows have been checked.
        batch: Arguments of a training step.
        options: Further arguments of both callbacks.
        notes: Takes remarks.
    """
    try:
        return _fit(model, gates, batch, options, notes, both=True)
    except ConfigurationError:
        # Some activations have no selection weight with a slope, or no regimes.
        names = ", ".join(sorted({site.activation.name for site in gates}))
        notes.append(f"by output derivative and without step scale, which {names} does not take")
    return _fit(model, gates, batch, options, notes, both=False)


def _fit(
    model: PeftModel,
    gates: GateMap,
    batch: Mapping[str, Any],
    options: Mapping[str, Any],
    notes: list[str],
    both: bool,
) -> list[str]:
    importance = GateImportanceCallback(
        KEEP,
        criterion="selection_derivative" if both else "output_derivative",
        warmup_steps=0,
        refresh_every=1,
        **options,
    )
    copies = Copies(gates.sites)
    module = Fit(model)
    hooks = hooks_on(model)
    with silent_lightning():
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[importance, *([StepScaleCallback(**options)] if both else []), copies],
        )
        torch.manual_seed(2)
        trainer.fit(module, DataLoader([dict(batch)] * 2, batch_size=None))  # type: ignore[arg-type]
    problems = []
    if len(module.losses) != 2 or not bool(torch.tensor(module.losses).isfinite().all()):
        problems.append(f"losses are {module.losses}")
    if hooks_on(model) != hooks:
        problems.append(f"{hooks_on(model) - hooks} hooks are left on the model")
    controller = importance.controller
    assert controller is not None
    assert controller.importance is not None
    found = [[(site.lora_layer_name, site.rows.tolist()) for site in sites] for sites in (gates, controller.gates)]
    if found[0] != found[1]:
        return [*problems, "the callbacks found other gates than the discovery"]
    weights = controller.importance.weights.split([site.networks * site.channels for site in gates])
    still = 0
    for place, (site, mask) in enumerate(zip(gates, weights, strict=True)):
        if copies.with_gradient[place]:
            mask = mask.view(site.networks, site.channels)
            problems += _moved(site, mask, copies.after[place] != copies.before[place])
        elif not torch.equal(copies.after[place], copies.before[place]):
            problems.append(f"{site.name} has no gradient and moved")
        else:
            still += 1
    if still:
        notes.append(f"{still} sites get no gradient in training")
    return problems


def _moved(site: GateSite, mask: Tensor, moved: Tensor) -> list[str]:
    """Whether exactly the rows of kept channels moved; ``mask`` is ``[networks, channels]``."""
    problems = []
    expected = max(1, int(KEEP * site.channels + 0.5))
    for network, kept in enumerate(mask):
        name = site.name if site.experts is None else f"{site.name} expert {network}"
        # An expert that has seen no token has no mask.
        allowed = {expected} if site.experts is None else {expected, site.channels}
        if set(kept.tolist()) - {0.0, 1.0} or int(kept.sum()) not in allowed:
            problems.append(f"{name}: the mask keeps {float(kept.sum()):g} of {site.channels} channels")
        rows = torch.stack([moved[int(row), network :: site.networks].any() for row in site.rows])
        wrong = (rows != (kept > 0)).nonzero().flatten().tolist()
        if wrong:
            problems.append(f"{name}: rows of channels {wrong[:4]} moved although masked, or stood still")
    others = torch.ones(len(moved), dtype=torch.bool)
    others[site.rows] = False
    if not bool(moved[others].any(dim=1).all()):
        problems.append(f"{site.name}: rows that make no gate channel stood still")
    if site.experts is not None and bool((mask.sum(1) == site.channels).all()):
        problems.append(f"{site.name}: no expert has a mask")
    return problems
