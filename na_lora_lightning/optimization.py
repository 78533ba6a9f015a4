"""The optimizer of a fit and its learning-rate schedule."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from na_lora_lightning.arguments import ScheduleArguments
from na_lora_lightning.errors import ConfigurationError

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


def describe_optimizer(factory: OptimizerFactory) -> dict[str, Any] | None:
    """Describes what a factory makes in plain values, which a checkpoint can hold.

    Args:
        factory: Takes parameters and returns an optimizer.

    Returns:
        ``class_path`` and ``init_args``, or None for an optimizer that cannot be described this way.
    """
    try:
        optimizer = factory([nn.Parameter(torch.zeros(1))])
    except Exception:  # A foreign factory may want more than one parameter; it gets the real ones in the fit.
        return None
    accepted = inspect.signature(type(optimizer)).parameters
    plain = (bool, int, float, str, type(None))
    arguments = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in optimizer.defaults.items()
        if name in accepted and (isinstance(value, plain) or _is_tuple_of(value, plain))
    }
    kind = type(optimizer)
    if kind.__module__.startswith("torch.optim."):
        return {"class_path": f"torch.optim.{kind.__name__}", "init_args": arguments}
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}


def _is_tuple_of(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, kinds) for item in value)


def optimizer_factory(description: OptimizerFactory | Mapping[str, Any]) -> OptimizerFactory:
    """Returns a factory from what :func:`describe_optimizer` returned, or a factory unchanged.

    Raises:
        ConfigurationError: The class is not an imported optimizer. A checkpoint must not cause code to be imported.
    """
    if not isinstance(description, Mapping):
        return description
    path = str(description.get("class_path"))
    module_name, _, class_name = path.rpartition(".")
    kind = getattr(sys.modules.get(module_name), class_name, None)
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
        raise ConfigurationError(f"The optimizer {path!r} is no imported optimizer class; import its module first.")
    arguments = dict(description.get("init_args") or {})
    if isinstance(arguments.get("betas"), list):
        arguments["betas"] = tuple(arguments["betas"])
    return partial(kind, **arguments)


def make_optimizer(factory: OptimizerFactory, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Makes the optimizer of the trainable parameters.

    Raises:
        ConfigurationError: It does not take the arguments that it was given, or cannot step with them.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        optimizer = factory(trained)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"The optimizer cannot be made ({error}); correct model.optimizer.") from error
    if type(optimizer).__module__.startswith("torch.optim."):
        _require_step(optimizer, trained[0].device)
    return optimizer


def _require_step(optimizer: Optimizer, device: torch.device) -> None:
    """Has a twin of an optimizer step a small parameter, as some notice only then what they cannot do."""
    kind = type(optimizer)
    accepted = inspect.signature(kind).parameters
    parameter = nn.Parameter(torch.zeros(2, 2, device=device))
    parameter.grad = torch.ones_like(parameter)
    twin: Any = kind([parameter], **{name: value for name, value in optimizer.defaults.items() if name in accepted})
    try:
        twin.step(lambda: torch.zeros((), device=device))
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"The optimizer {kind.__name__} cannot step here ({error}); correct model.optimizer, or name another one."
        ) from error


def make_schedule(arguments: ScheduleArguments, optimizer: Optimizer, total_steps: float) -> LRScheduler:
    """Makes the learning-rate schedule, to be stepped after every optimizer step.

    Args:
        arguments: Its shape and warm-up.
        optimizer: Whose learning rates it sets, relative to those that they have now.
        total_steps: Optimizer steps of the whole fit; infinite if the trainer has no limit.

    Returns:
        The schedule.

    Raises:
        ConfigurationError: The shape needs an end and there is none, or its options do not fit.
    """
    from transformers import get_scheduler

    endless = total_steps == float("inf")
    if endless and (arguments.name not in ("constant", "constant_with_warmup") or arguments.warmup_steps is None):
        raise ConfigurationError(
            f"The schedule {arguments.name!r} needs a fit with an end; set trainer.max_epochs or trainer.max_steps, or "
            "use 'constant_with_warmup' with schedule.warmup_steps."
        )
    warmup = arguments.warmup_steps
    if warmup is None:
        warmup = round(arguments.warmup_fraction * total_steps)
    if not endless and warmup >= total_steps > 1:
        rank_zero_warn(
            f"The learning rate warms up over {warmup} of {int(total_steps)} optimizer steps, so training never "
            "reaches it; lower schedule.warmup_steps."
        )
    try:
        schedule = get_scheduler(
            arguments.name,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=None if endless else int(total_steps),
            scheduler_specific_kwargs=dict(arguments.options),
        )
        _try_out(schedule, warmup, total_steps)
        return schedule
    except (TypeError, ValueError, ArithmeticError) as error:
        needed = re.findall(r"'(\w+)'", str(error)) if "missing" in str(error) else []
        remedy = f"set {' and '.join(needed)} in schedule.options" if needed else "correct schedule.options"
        raise ConfigurationError(f"The schedule {arguments.name!r} cannot be made ({error}); {remedy}.") from error


def _try_out(schedule: LRScheduler, warmup: int, total_steps: float) -> None:
    """Asks a schedule for the rates of each of its parts, whose options it may look at much later.

    Raises:
        ValueError: A rate is not a number.
    """
    for shape in getattr(schedule, "lr_lambdas", ()):
        for step in {0, warmup, warmup + 1, *([] if total_steps == float("inf") else [int(total_steps) - 1])}:
            if not math.isfinite(float(shape(step))):
                raise ValueError(f"its rate at step {step} is not finite")
