"""The learning-rate schedule of a fit: a shape that transformers names, or any scheduler by its import path."""

from __future__ import annotations

import inspect
import math
import re
import sys
from importlib import import_module
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from na_lora_lightning.arguments import ScheduleOptions
from na_lora_lightning.errors import ConfigurationError, one_line

_LIBRARIES = ("torch", "transformers")


def make_schedule(
    arguments: ScheduleOptions, optimizer: Optimizer, total_steps: float, epochs: int | None = None
) -> LRScheduler:
    """Makes the learning-rate schedule.

    Args:
        arguments: Its shape and warm-up, or what makes it.
        optimizer: Whose learning rates it sets, relative to those that they have now.
        total_steps: Optimizer steps of the whole fit; infinite if the trainer has no limit.
        epochs: Epochs of the whole fit, where they are its limit.

    Returns:
        The schedule.

    Raises:
        ConfigurationError: The shape needs an end and there is none, or its options do not fit.
    """
    endless = total_steps == float("inf")
    warmup = arguments.warmup_steps
    if warmup is None and not endless:
        warmup = round(arguments.warmup_fraction * total_steps)
    total = None if endless else int(total_steps)
    try:
        if arguments.is_imported:
            if arguments.interval == "epoch":
                total = epochs
            schedule = _imported_schedule(arguments, optimizer, warmup, total)
        else:
            schedule = _named_schedule(arguments, optimizer, warmup, total)
        if not isinstance(schedule, LambdaLR):
            return schedule
        if warmup is not None and total is not None and warmup >= total > 1:
            rank_zero_warn(
                f"the learning rate warms up over {warmup} of {total} optimizer steps, so training never reaches it; "
                "lower schedule.warmup_steps."
            )
        _try_out(schedule, warmup or 0, total_steps)
        return schedule
    except ConfigurationError:
        raise
    except (TypeError, ValueError, ArithmeticError, AttributeError, KeyError) as error:
        needed = re.findall(r"'(\w+)'", str(error)) if "missing" in str(error) else []
        remedy = f"set {' and '.join(needed)} in schedule.options" if needed else "correct schedule.options"
        raise ConfigurationError(
            f"the schedule {arguments.name!r} cannot be made ({one_line(error)}); {remedy}."
        ) from error


def _named_schedule(
    arguments: ScheduleOptions, optimizer: Optimizer, warmup: int | None, total: int | None
) -> LRScheduler:
    from transformers import get_scheduler

    if total is None and (arguments.name not in ("constant", "constant_with_warmup") or warmup is None):
        raise _endless(arguments)
    return get_scheduler(
        arguments.name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total,
        scheduler_specific_kwargs=dict(arguments.options),
    )


def _endless(arguments: ScheduleOptions) -> ConfigurationError:
    return ConfigurationError(
        f"the schedule {arguments.name!r} needs a fit with an end; set trainer.max_steps, or "
        "trainer.max_epochs where data are not streamed, or use 'constant_with_warmup' with schedule.warmup_steps."
    )


def _imported_schedule(
    arguments: ScheduleOptions, optimizer: Optimizer, warmup: int | None, total: int | None
) -> LRScheduler:
    make = _imported(arguments.name)
    accepted = inspect.signature(make).parameters
    if "num_warmup_steps" not in accepted and (arguments.warmup_steps or arguments.warmup_fraction != _DEFAULT_WARMUP):
        raise ConfigurationError(
            f"the schedule {arguments.name!r} knows no warm-up of schedule.warmup_steps or schedule.warmup_fraction; "
            "leave them out, and use its own schedule.options."
        )
    if any(name in accepted for name in _NOT_PLAIN):
        raise ConfigurationError(
            f"the schedule {arguments.name!r} is made of functions or other schedulers, which options cannot say; name "
            "another one, or return it from configure_optimizers of a class of your own."
        )
    given: dict[str, Any] = dict(arguments.options)
    if "epochs" not in given and "total_steps" in accepted:
        given.setdefault("total_steps", total)
    for name, value in (("num_training_steps", total), ("num_warmup_steps", warmup)):
        if name in accepted:
            given.setdefault(name, value)
    if any(value is None and name in _OF_THE_FIT for name, value in given.items()):
        raise _endless(arguments)
    schedule = make(optimizer, **given)
    if not isinstance(schedule, LRScheduler):
        raise TypeError(f"it makes a {type(schedule).__name__}")
    if isinstance(schedule, ReduceLROnPlateau) and arguments.monitor is None:
        raise ConfigurationError(
            "ReduceLROnPlateau waits for a metric and none is named; set schedule.monitor, such as validation/loss."
        )
    if not isinstance(schedule, ReduceLROnPlateau) and arguments.monitor is not None:
        raise ConfigurationError(
            f"schedule.monitor is {arguments.monitor!r}, and the schedule {arguments.name!r} looks at no "
            "metric; leave it out, or name torch.optim.lr_scheduler.ReduceLROnPlateau."
        )
    return schedule


_NOT_PLAIN = ("lr_lambda", "schedulers")
_OF_THE_FIT = ("total_steps", "num_training_steps", "num_warmup_steps")
_DEFAULT_WARMUP = ScheduleOptions().warmup_fraction


def _imported(path: str) -> Any:
    """A scheduler's class, or a function that makes one of an optimizer.

    A checkpoint names it too and must not cause code to be imported, but for that of the libraries.
    """
    module_name, _, name = path.rpartition(".")
    module = sys.modules.get(module_name)
    if module is None and module_name.partition(".")[0] in _LIBRARIES:
        try:
            module = import_module(module_name)
        except ImportError:
            module = None
    found = getattr(module, name, None)
    if isinstance(found, type) and issubclass(found, LRScheduler) and found is not LRScheduler:
        return found
    if (
        inspect.isfunction(found)
        and "schedule" in name
        and next(iter(inspect.signature(found).parameters), "") == ("optimizer")
    ):
        return found
    raise ConfigurationError(
        f"schedule.name={path!r} is no scheduler of torch or transformers, nor of a module that is imported; correct "
        "it, or import its module first."
    )


def require_metric(arguments: ScheduleOptions, trainer: Trainer, names: set[str]) -> None:
    """Checks that the metric that a schedule waits for is going to be there.

    Args:
        arguments: The schedule's options.
        trainer: Before its fit.
        names: Metrics that the module logs.

    Raises:
        ConfigurationError: It is not.
    """
    monitor = arguments.monitor
    if monitor is None:
        return
    known = sorted(name for name in names if name == "train/loss" or name.startswith("validation/"))
    if monitor not in known:
        raise ConfigurationError(
            f"schedule.monitor is {monitor!r}, which this fit does not measure; use one of {', '.join(known)}."
        )
    if arguments.interval != "step":
        raise ConfigurationError(
            "schedule.interval does not work with ReduceLROnPlateau, which looks whenever its metric is measured; "
            "leave it out."
        )
    if monitor.startswith("validation/") and not validates(trainer, trainer.datamodule):  # type: ignore[attr-defined]
        raise ConfigurationError(
            f"schedule.monitor is {monitor!r}, and there is no validation to measure it in; give data.validation, or "
            "monitor 'train/loss'."
        )


def validates(trainer: Trainer, data: LightningDataModule | None) -> bool:
    """Whether a fit has data to validate on, as far as those tell before they are loaded."""
    sources = getattr(data, "sources", None)
    return trainer.limit_val_batches != 0 and not (isinstance(sources, dict) and sources.get("validation") is None)


def set_rate(optimizer: Optimizer, rate: float, schedule: LRScheduler | None = None) -> None:
    """Gives the first group of an optimizer a rate, and the others theirs in proportion.

    Args:
        optimizer: Before its first step.
        rate: What the schedule multiplies.
        schedule: Its schedule, if there is one already.

    Raises:
        ConfigurationError: The schedule has rates of its own.
    """
    groups = optimizer.param_groups
    if schedule is not None and "max_lr" in groups[0]:
        raise ConfigurationError(
            f"a learning rate was found, and {type(schedule).__name__} has its own in schedule.options; leave "
            "LearningRateFinder out, or use a schedule that begins with the optimizer's rate."
        )
    # A plateau's is that of now.
    former = getattr(schedule, "base_lrs", None) or [group.get("initial_lr", group["lr"]) for group in groups]
    rates = [rate * value / former[0] if former[0] else rate for value in former]
    shapes = [1.0] * len(groups)
    if isinstance(schedule, LambdaLR):
        shapes = [shape(schedule.last_epoch) for shape in schedule.lr_lambdas]
    elif schedule is not None:
        shapes = [now / base if base else 1.0 for now, base in zip(schedule.get_last_lr(), former, strict=True)]
    for group, value, shape in zip(groups, rates, shapes, strict=True):
        group["initial_lr"] = value
        group["lr"] = value * shape
    if schedule is not None:
        schedule.base_lrs = rates


def _try_out(schedule: LRScheduler, warmup: int, total_steps: float) -> None:
    """Asks a schedule for the rates of each of its parts, whose options it may look at much later.

    Raises:
        ValueError: A rate is not a number.
    """
    for shape in getattr(schedule, "lr_lambdas", ()):
        for step in {0, warmup, warmup + 1, *([] if total_steps == float("inf") else [int(total_steps) - 1])}:
            if not math.isfinite(float(shape(step))):
                raise ValueError(f"its rate at step {step} is not finite")
