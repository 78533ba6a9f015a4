"""Options of the trainer that cannot work, found before anything is loaded, and the length of a fit that says none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    ModelCheckpoint,
    ModelPruning,
)

from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.modules.schedules import validates

EPOCHS = 3
"""Of a fit that is not told when to end."""

# What one of the mechanisms takes over from the other, and the switch.
_SHARED = ("observer", "allow_unmasked_gates", "example_inputs", "view", "enabled")
# As many processes are let alone on any machine.
_PROCESSES = 8
_KNOWN = ("lightning.", "na_lora_lightning.")
# Lowest value, whether as a whole number or not, and what it means.
_LOWEST = {
    "accumulate_grad_batches": (1, "counts the batches of a step"),
    "check_val_every_n_epoch": (1, "counts epochs from one validation to the next"),
    "gradient_clip_val": (0, "is the longest gradient"),
    "log_every_n_steps": (0, "counts steps from one point of a curve to the next"),
    "num_sanity_val_steps": (-1, "counts batches, with -1 for all of them"),
}
_OF_A_FIT = {"max_epochs": "epochs", "max_steps": "optimizer steps", "limit_train_batches": "batches"}


def with_end(options: Mapping[str, Any]) -> dict[str, Any]:
    """Gives a trainer its number of epochs where no option says when the fit ends.

    ``max_steps`` and ``max_time`` say it; ``min_epochs`` is reached.
    """
    given = dict(options)
    if given.get("max_epochs") is None:
        is_limited = given.get("max_steps", -1) != -1 or given.get("max_time") is not None
        given["max_epochs"] = -1 if is_limited else max(EPOCHS, given.get("min_epochs") or 0)
    return given


def require_possible(options: Mapping[str, Any], fits: bool) -> None:
    """Checks numbers that Lightning takes and cannot work with.

    Args:
        options: Of the trainer, by name.
        fits: Whether it is to train.

    Raises:
        ConfigurationError: One cannot work.
    """
    for name, (lowest, meaning) in _LOWEST.items():
        value = options.get(name)
        if value is not None and value < lowest:
            raise ConfigurationError(f"trainer.{name} is {value}, and it {meaning}; set it to {lowest} or more.")
    if options.get("val_check_interval") == 0:
        raise ConfigurationError(
            "trainer.val_check_interval is 0, and it says how often to validate; set it to a part of an epoch above 0 "
            "or a number of batches, or leave validation out with trainer.limit_val_batches=0."
        )
    devices = options.get("devices")
    cores = os.cpu_count() or 1
    if options.get("accelerator") == "cpu" and str(devices).isdigit() and int(str(devices)) > max(cores, _PROCESSES):
        raise ConfigurationError(
            f"trainer.devices is {devices}, and each is a process of its own on the {cores} cores of this machine; set "
            f"it to at most {max(cores, _PROCESSES)}."
        )
    if not fits:
        return
    for name, unit in _OF_A_FIT.items():
        if options.get(name) == 0:
            raise ConfigurationError(
                f"trainer.{name} is 0, and a fit without {unit} trains nothing; set it to 1 or more."
            )
    for unit in ("epochs", "steps"):
        least, most = options.get(f"min_{unit}"), options.get(f"max_{unit}")
        if least is not None and most not in (None, -1) and least > most:
            raise ConfigurationError(
                f"trainer.min_{unit} is {least} and trainer.max_{unit} is {most}, so the fit would end before the "
                "least of it; raise the one or lower the other."
            )


def replaced_groups(
    listed: Iterable[Callback], kinds: Mapping[str, type[Callback]], config: Mapping[str, Any], defaults: Any
) -> set[str]:
    """The groups of options in whose place the trainer's options have a callback.

    Args:
        listed: Those of the trainer's options.
        kinds: Those of every fit, by their group of options.
        config: The options of a command.
        defaults: All of them as they are where none is given.

    Raises:
        ConfigurationError: Options are given in both places.
    """
    found = {name for name, kind in kinds.items() if any(isinstance(callback, kind) for callback in listed)}
    for name in sorted(found):
        given = vars(config[name])
        if any(value != defaults[name][key] for key, value in given.items() if key not in _SHARED):
            raise ConfigurationError(
                f"{kinds[name].__name__} is in trainer.callbacks, and the group {name!r} has options of it too; leave "
                "one of the two out."
            )
    return found


def require_usable_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuses callbacks that do not work on this package's module.

    Raises:
        ConfigurationError: One is among them.
    """
    for kind, reason in ((BackboneFinetuning, "looks for a module 'backbone'"), (ModelPruning, "prunes base weights")):
        if any(isinstance(callback, kind) for callback in callbacks):
            raise ConfigurationError(
                f"{kind.__name__} {reason}, and here LoRA alone is trained; leave it out of trainer.callbacks."
            )


def require_metrics(trainer: Trainer, module: LightningModule, data: LightningDataModule | None) -> None:
    """Checks that what callbacks monitor is going to be logged.

    Where there are callbacks of another package, which may log more, Lightning finds out when the metric is missed.

    Args:
        trainer: Before its fit.
        module: Says what it logs, with ``metric_names``.
        data: What it trains and validates on.

    Raises:
        ConfigurationError: A metric is not, or there is no validation data to measure it on.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not all(type(callback).__module__.startswith(_KNOWN) for callback in callbacks):
        return
    names: set[str] = module.metric_names()  # type: ignore[operator]
    sources = getattr(data, "sources", None)
    has_validation = validates(trainer, data)
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if not isinstance(callback, (EarlyStopping, ModelCheckpoint)) or not isinstance(monitor, str):
            continue
        name = f"{type(callback).__name__} monitors {monitor!r}"
        if monitor.startswith("validation/") and monitor in names and not has_validation:
            raise ConfigurationError(
                f"{name}, and there is no validation to measure it in; give data.validation, or monitor 'train/loss'."
            )
        if monitor not in names and monitor not in ("epoch", "step") and not monitor.startswith("lr-"):
            raise ConfigurationError(f"{name}, which this fit does not log; monitor one of {', '.join(sorted(names))}.")
    every = trainer.check_val_every_n_epoch
    epochs = trainer.max_epochs
    if has_validation and sources is not None and every is not None and epochs not in (None, -1) and every > epochs:
        raise ConfigurationError(
            f"trainer.check_val_every_n_epoch is {every} and the fit has {epochs} epochs, so it would never validate; "
            "lower it, or leave data.validation out."
        )
