"""The options of an optimizer's groups and of its schedule in a checkpoint that training resumes from."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from na_lora_lightning.errors import ConfigurationError

_PLAIN = (bool, int, float, str, type(None))
_START = "start a new fit without ckpt_path"


def class_path(kind: type[Optimizer]) -> str:
    """The import path of a class of optimizers, without the private module that torch has it in."""
    if kind.__module__.startswith("torch.optim."):
        return f"torch.optim.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def describe_groups(optimizer: Optimizer) -> dict[str, Any]:
    """The class of an optimizer and the plain options of its groups as they are before the first step."""
    return {"class_path": class_path(type(optimizer)), "groups": [_options(group) for group in optimizer.param_groups]}


def is_fused_by_default(optimizer: Optimizer) -> bool:
    """Whether nothing was said of fusing an optimizer of torch, which then is where it can, or stays as it was."""
    return "fused" in optimizer.defaults and optimizer.defaults["fused"] is None


def require_same_optimizer(former_class: str | None, saved: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Checks that the state of a checkpoint's optimizer is one of this optimizer.

    Args:
        former_class: Its class, where the checkpoint says it.
        saved: Its state.
        optimizer: The one of now.

    Raises:
        ConfigurationError: It is of another class, or has its parameters in other groups.
    """
    now = class_path(type(optimizer))
    groups = saved["param_groups"]
    is_other = former_class != now
    if former_class is None:
        is_other = _names(groups) != _names(optimizer.param_groups)
    if is_other:
        former = "another one" if former_class is None else former_class
        raise ConfigurationError(
            f"the checkpoint was trained with the optimizer {former} and this run has {now}, which cannot resume from "
            f"the other's state; set model.optimizer as it was, or {_START}."
        )
    sizes, sizes_now = ([len(group["params"]) for group in each] for each in (groups, optimizer.param_groups))
    if sizes != sizes_now:
        raise ConfigurationError(
            f"the checkpoint's optimizer has its parameters in groups of {_listed(sizes)} and this run's in groups of "
            f"{_listed(sizes_now)}, so its state cannot be used; set model.optimizer as it was, or {_START}."
        )


def adopt_groups(
    saved: dict[str, Any], recorded: Sequence[Mapping[str, Any]] | None, optimizer: Optimizer
) -> list[tuple[str, Any, Any]]:
    """Puts the options of this optimizer's groups into a checkpoint's, where they were others.

    Args:
        saved: State of the checkpoint's optimizer; changed in place.
        recorded: What :func:`describe_groups` said of it; None for a checkpoint of an earlier version.
        optimizer: The one of now, before its first step.

    Returns:
        Name, former and present value of each changed option.

    Raises:
        ConfigurationError: The saved state lacks what a changed option needs.
    """
    accepted = inspect.signature(type(optimizer)).parameters
    changes: dict[str, tuple[str, Any, Any]] = {}
    for number, (group, fresh) in enumerate(zip(saved["param_groups"], optimizer.param_groups, strict=True)):
        former = _options(group)
        if recorded is not None:
            # Some optimizers count in their groups. A rate that has no schedule's beginning beside it was changed on
            # the way, as ReduceLROnPlateau does.
            moved = () if "initial_lr" not in group else ("lr",)
            former = {**former, **{name: value for name, value in recorded[number].items() if name not in moved}}
        for name, now in _options(fresh).items():
            known = name in accepted if recorded is None else name in recorded[number]
            if not (known or name == "lr") or name not in former or former[name] == now:
                continue
            if name == "fused" and is_fused_by_default(optimizer):
                continue
            if name == "lr" and "initial_lr" in group:
                group["initial_lr"] = fresh["initial_lr"] if "initial_lr" in fresh else fresh["lr"]
            else:
                group[name] = fresh[name]
            others = [_options(entry).get(name) for entry in optimizer.param_groups]
            label = name if all(other == now for other in others) else f"{name} of group {number}"
            changes.setdefault(label, (label, former[name], now))
    if changes:
        _require_state_for(saved, optimizer, {name: then for name, then, _ in changes.values()})
    return list(changes.values())


def adopt_rates(saved: dict[str, Any], schedule_state: dict[str, Any], schedule: LRScheduler) -> tuple[Any, Any]:
    """Puts the learning rates that a schedule has at the checkpoint's step into the checkpoint.

    Args:
        saved: State of the optimizer; changed in place, as is ``schedule_state``.
        schedule_state: State of its schedule.
        schedule: The one of now.

    Returns:
        The first rate as it was and as it is.
    """
    groups = saved["param_groups"]
    former = groups[0]["lr"]
    if not isinstance(schedule, LambdaLR):
        return former, former
    step = schedule_state["last_epoch"]
    bases = [group.get("initial_lr", group["lr"]) for group in groups]
    rates = [base * shape(step) for base, shape in zip(bases, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(groups, rates, strict=True):
        if group["lr"] != rate:
            group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], Tensor) else rate
    schedule_state["base_lrs"] = bases
    schedule_state["_last_lr"] = [group["lr"] for group in groups]
    return float(former), float(groups[0]["lr"])


def describe_schedule(schedule: LRScheduler) -> dict[str, Any]:
    """The class of a schedule and its plain values before the first step; nothing of one that is a factor by step."""
    if isinstance(schedule, LambdaLR):
        return {}
    kind, state = type(schedule), schedule.state_dict()
    plain = _options(state)
    # Phases and milestones are held in containers; what has an address in its name is a function.
    held = {name: repr(value) for name, value in state.items() if name not in plain and " at 0x" not in repr(value)}
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", **plain, **held}


def require_same_schedules(former: Sequence[Mapping[str, Any]] | None, now: Sequence[Mapping[str, Any]]) -> None:
    """Checks that schedules whose state holds their options, which restoring puts back, have the ones of before.

    Args:
        former: What :func:`describe_schedule` said of the checkpoint's; None where it says nothing.
        now: What it says of this run's.

    Raises:
        ConfigurationError: They differ.
    """
    for then, entry in zip(former or (), now, strict=False):
        changed = [name for name in sorted({*then, *entry}) if then.get(name) != entry.get(name)]
        if changed:
            name = "class_path" if "class_path" in changed else max(changed, key=lambda name: name[0] != "_")
            described = [
                values.get(name, "a named one" if name == "class_path" else "none") for values in (then, entry)
            ]
            raise ConfigurationError(
                f"the checkpoint's schedule has {name}={described[0]} and this run's {described[1]}, and it cannot "
                f"change on the way; set schedule, optimizer and length of the fit as they were, or {_START}."
            )


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in group.items():
        plain = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if isinstance(plain, (tuple, list)) and len(plain) <= 8 and all(isinstance(entry, _PLAIN) for entry in plain):
            found[name] = list(plain)
        elif name != "initial_lr" and isinstance(plain, _PLAIN):
            found[name] = plain
    if "initial_lr" in group:
        found["lr"] = float(group["initial_lr"])
    found.pop("params", None)
    return found


def _names(groups: Sequence[Mapping[str, Any]]) -> list[set[str]]:
    return [set(group) for group in groups]


def _listed(sizes: Sequence[int]) -> str:
    return " and ".join(str(size) for size in sizes)


def _require_state_for(saved: dict[str, Any], optimizer: Optimizer, former: Mapping[str, Any]) -> None:
    """Options such as ``amsgrad`` need a state that training without them has not made."""
    lacking = _lacking_state(saved, optimizer)
    if lacking is None:
        return
    culprits = []
    for name, value in former.items():
        groups = [{**group, name: value} for group in saved["param_groups"]]
        if _lacking_state({**saved, "param_groups": groups}, optimizer) is None:
            culprits.append(name)
    raise ConfigurationError(
        f"the option {', '.join(culprits or former)} of the optimizer cannot change on the way, as the checkpoint has "
        f"no {lacking!r} that it needs; set it as it was, or {_START}."
    )


def _lacking_state(saved: Mapping[str, Any], optimizer: Optimizer) -> str | None:
    """Takes a step aside, and says what of the state is not there."""
    aside = copy.deepcopy(optimizer)
    try:
        aside.load_state_dict(copy.deepcopy(dict(saved)))
        for group in aside.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        aside.step()
    except KeyError as error:
        return str(error.args[0])
    except Exception:  # What steps otherwise, say with a closure, shows only in the fit.
        return None
    return None
