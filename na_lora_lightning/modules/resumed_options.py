"""Resuming from a checkpoint with other options than it was trained with.

A checkpoint holds more than weights: learning rates and all else of the optimizer's groups, the schedule's base rates,
the random state, and options of callbacks, which loading it would put over those that are given now. Here those of now
are put into the loaded checkpoint first, what cannot change is refused, and one line names what has changed. What has
not changed is left exactly as it was saved.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from na_lora_lightning.core.in_force import say
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.lightning_internals import progress_of_fit
from na_lora_lightning.modules.resumed_callbacks import adopt_callback_options, describe_callbacks
from na_lora_lightning.modules.resumed_optimizer import (
    adopt_groups,
    adopt_rates,
    describe_groups,
    describe_schedule,
    require_same_optimizer,
    require_same_schedules,
)

OPTIONS_KEY = "na_lora_lightning_options"
_OF_TRAINER = (
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "precision",
    "limit_train_batches",
    "overfit_batches",
    "max_epochs",
    "max_steps",
    "min_epochs",
    "min_steps",
    "val_check_interval",
    "check_val_every_n_epoch",
    "reload_dataloaders_every_n_epochs",
)
_FRACTIONS = ("limit_train_batches", "overfit_batches", "val_check_interval")
# What of the module's hyper-parameters training depends on; LoRA is compared with more care elsewhere.
_OF_MODULE = (
    "model_name_or_path",
    "revision",
    "dtype",
    "attention_implementation",
    "gradient_checkpointing",
    "quantization.kind",
    "lora.dropout",
    "lora.init_lora_weights",
    "lora.layers",
)
# What was in force before there was an option for it.
_FORMERLY = {"lora.layers": "peft", "quantization.kind": None}
_GROUPS_OF_MODULE = ("schedule", "loss")


class ResumedOptions:
    """The options of a fit, compared with those of the checkpoint that it resumes from.

    Args:
        checkpoint: What Lightning has loaded and is going to restore from; None where training begins.
        draws_seed: Whether the seed is drawn for each run, so that a different one is not a changed option.
    """

    def __init__(self, checkpoint: dict[str, Any] | None = None, draws_seed: bool = False) -> None:
        self._seed = "drawn" if draws_seed else _seed()
        self._checkpoint = checkpoint
        self._saved: Mapping[str, Any] = (checkpoint or {}).get(OPTIONS_KEY, {})
        self._now: dict[str, Any] = {}

    @property
    def keeps_random_state(self) -> bool:
        """Whether the random numbers go on as they were: another seed is there to change them."""
        return self._seed is None or bool(self._saved.get("seed_everything", self._seed) == self._seed)

    def planned_steps(self, trainer: Trainer) -> float:
        """Optimizer steps of the whole fit, those before the checkpoint included; infinite without a limit.

        Raises:
            ConfigurationError: The checkpoint was saved where no step of as many batches begins.
        """
        total: float = trainer.estimated_stepping_batches
        if total < 0:
            # Of data without a length, epochs are no limit.
            return float("inf")
        changed = any(
            self._saved.get(f"trainer.{name}", now) != now
            for name, now in _trainer_options(trainer).items()
            if name in ("accumulate_grad_batches", "limit_train_batches", "overfit_batches")
        )
        batches, epochs = trainer.num_training_batches, trainer.max_epochs
        if self._checkpoint is None or not changed or batches == float("inf") or epochs in (None, -1):
            return total
        # Steps of another size are behind: those still to come are added to them.
        per_step = trainer.accumulate_grad_batches
        epoch, ready = progress_of_fit(self._checkpoint)
        steps_of_epoch = ceil(batches / per_step)
        left = (epochs - epoch["processed"]) * steps_of_epoch
        if epoch["processed"] < epoch["ready"]:
            if ready < batches and ready % per_step:
                raise ConfigurationError(
                    f"the checkpoint was saved after {ready} batches of an epoch, which are not whole steps of "
                    f"trainer.accumulate_grad_batches={per_step}; set it to "
                    f"{self._saved.get('trainer.accumulate_grad_batches')} as before, or to a divisor of {ready}."
                )
            left -= min(ceil(ready / per_step), steps_of_epoch)
        steps = self._checkpoint["global_step"] + max(left, 0)
        return float(steps if trainer.max_steps == -1 else min(steps, trainer.max_steps))

    def describe(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """What a checkpoint says of the options: plain values by name, and the optimizer's groups."""
        return {
            **{f"trainer.{name}": value for name, value in _trainer_options(trainer).items()},
            **dict(_module_options(module.hparams)),
            "seed_everything": self._seed,
            "callbacks": describe_callbacks(trainer),
            "optimizers": [describe_groups(optimizer) for optimizer in trainer.optimizers],
            "schedules": [describe_schedule(entry.scheduler) for entry in trainer.lr_scheduler_configs],
        }

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Puts the options of now into the loaded checkpoint, and says which have changed; before it is restored.

        Raises:
            ConfigurationError: An option cannot change on the way.
        """
        self._now = self.describe(trainer, module)
        # Not kept, as it is as large as the optimizer's state.
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is None:
            return
        require_same_schedules(self._saved.get("schedules"), self._now["schedules"])
        former = {**_FORMERLY, **dict(_module_options(checkpoint.get("hyper_parameters", {}))), **self._saved}
        changes = [
            f"{name} {_shown(former[name])} → {_shown(now)}"
            for name, now in self._now.items()
            if name not in ("callbacks", "optimizers", "schedules")
            and name in former
            and former[name] != now
            # Without a seed the random numbers go on.
            and not (name == "seed_everything" and now is None)
        ]
        for number, optimizer in enumerate(trainer.optimizers):
            changes += self._adopt_optimizer(checkpoint, number, optimizer, trainer, known=bool(changes))
        changes += adopt_callback_options(checkpoint, self._saved.get("callbacks", {}), trainer)
        if changes:
            say(f"Training resumes with other options than the checkpoint's: {', '.join(changes)}.")

    def _adopt_optimizer(
        self, checkpoint: dict[str, Any], number: int, optimizer: Optimizer, trainer: Trainer, known: bool
    ) -> Iterator[str]:
        states = checkpoint.get("optimizer_states") or []
        if number >= len(states):
            return
        recorded = (self._saved.get("optimizers") or [{}] * (number + 1))[number]
        described = checkpoint.get("hyper_parameters", {}).get("optimizer")
        # Where it is described as now, a function may have made it, which says nothing of its class.
        is_other = isinstance(described, Mapping) and described != trainer.lightning_module.hparams.get("optimizer")
        former_class = recorded.get("class_path") or (is_other and described.get("class_path"))
        require_same_optimizer(former_class or None, states[number], optimizer)
        changes = adopt_groups(states[number], recorded.get("groups"), optimizer)
        yield from (f"optimizer.{name} {_shown(then)} → {_shown(now)}" for name, then, now in changes)
        schedules = [entry.scheduler for entry in trainer.lr_scheduler_configs]
        for schedule, state in zip(schedules, checkpoint.get("lr_schedulers") or [], strict=False):
            if schedule.optimizer is optimizer:
                then, now = adopt_rates(states[number], state, schedule)
                if then != now and not changes and not known:
                    yield f"learning rate of the next step {_shown(then)} → {_shown(now)}"

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Writes the options into a checkpoint of this fit."""
        if self._now:
            checkpoint[OPTIONS_KEY] = self._now


def _trainer_options(trainer: Trainer) -> dict[str, Any]:
    found = {name: _plain(getattr(trainer, name, None)) for name in _OF_TRAINER}
    for name in _FRACTIONS:
        if isinstance(found[name], float):
            # 1.0 is all of them, and 1 is one.
            found[name] = f"{100 * found[name]:g} %"
    return found


def _module_options(hparams: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name in _OF_MODULE:
        group, _, option = name.rpartition(".")
        values = hparams.get(group, {}) if group else hparams
        if isinstance(values, Mapping) and option in values:
            yield name, _plain(values[option])
    for group in _GROUPS_OF_MODULE:
        values = hparams.get(group)
        if isinstance(values, Mapping):
            yield from ((f"{group}.{option}", _plain(value)) for option, value in values.items())


def _seed() -> int | None:
    # Where Lightning leaves it.
    seed = os.environ.get("PL_GLOBAL_SEED")
    return int(seed) if seed and seed.isdigit() else None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    if isinstance(value, str):
        # Also of an enumeration, whose members are strings of a class of their own.
        return str(getattr(value, "value", value))
    return value if isinstance(value, (bool, int, float, type(None))) else str(value)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
