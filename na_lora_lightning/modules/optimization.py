"""The optimizer of a fit."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, get_type_hints

import torch
from torch import nn
from torch.optim import Optimizer

from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.modules.resumed_optimizer import class_path, is_fused_by_default

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
"""Makes an optimizer of the trainable parameters, or of the model where that is what its first parameter is."""

_MODEL_NAMES = ("model", "peft_model", "module", "net", "network")
_PLAIN = (bool, int, float, str, type(None))


def takes_model(factory: Callable[..., Any]) -> bool:
    """Whether a factory of optimizers wants the model and not its parameters, by the first parameter that it lacks.

    PEFT's ``create_loraplus_optimizer`` and ``create_lorafa_optimizer`` do.
    """
    made_by, given = _underlying(factory)
    try:
        parameters = list(inspect.signature(made_by).parameters.values())
    except (TypeError, ValueError):
        return False
    first = next((entry for entry in parameters if entry.name not in given), None)
    if first is None:
        return False
    try:
        kind = get_type_hints(made_by.__init__ if inspect.isclass(made_by) else made_by).get(first.name)
    except Exception:  # An annotation may name what is not there at run time.
        kind = None
    return first.name in _MODEL_NAMES or (isinstance(kind, type) and issubclass(kind, nn.Module))


def _underlying(factory: Callable[..., Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function or class below partial applications, and the arguments that they give by name."""
    given: dict[str, Any] = {}
    while isinstance(factory, partial):
        given = {**factory.keywords, **given}
        # The command line's parser applies a function of its own to the class.
        factory = next((entry for entry in factory.args if callable(entry) and hasattr(entry, "__mro__")), factory.func)
    return getattr(factory, "wrapped_function", factory), given


def describe_optimizer(factory: OptimizerFactory) -> dict[str, Any] | None:
    """Describes what a factory makes in plain values, which a checkpoint can hold.

    Args:
        factory: Takes parameters, or the model, and returns an optimizer.

    Returns:
        ``class_path`` and ``init_args``, or None for an optimizer that cannot be described this way.
    """
    if takes_model(factory):
        return _describe_function(*_underlying(factory))
    try:
        optimizer = factory([nn.Parameter(torch.zeros(1))])
    except Exception:  # A foreign factory may want more than one parameter; it gets the real ones in the fit.
        return None
    accepted = inspect.signature(type(optimizer)).parameters
    arguments = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in optimizer.defaults.items()
        if name in accepted and _is_plain(value)
    }
    return {"class_path": class_path(type(optimizer)), "init_args": arguments}


def _describe_function(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any] | None:
    name = getattr(function, "__qualname__", "<")
    module = sys.modules.get(function.__module__)
    if "<" in name or module is None:
        return None
    arguments: dict[str, Any] = {}
    for option, value in given.items():
        if isinstance(value, type) and issubclass(value, Optimizer):
            arguments[option] = class_path(value)
        elif _is_plain(value):
            arguments[option] = list(value) if isinstance(value, tuple) else value
        else:
            return None
    # PEFT's own are known by the package that exports them.
    package = _OF_PEFT if getattr(sys.modules.get(_OF_PEFT), name, None) is not None else function.__module__
    return {"class_path": f"{package}.{name}", "init_args": arguments}


_OF_PEFT = "peft.optimizers"


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(isinstance(item, _PLAIN) for item in value))


def optimizer_factory(description: OptimizerFactory | Mapping[str, Any]) -> OptimizerFactory:
    """Returns a factory from what :func:`describe_optimizer` returned, or a factory unchanged.

    Raises:
        ConfigurationError: The class is not an imported optimizer. A checkpoint must not cause code to be imported.
    """
    if not isinstance(description, Mapping):
        return description
    path = str(description.get("class_path"))
    kind = _imported(path)
    if not (_is_optimizer(kind) or _makes_optimizer_of_model(kind)):
        raise ConfigurationError(f"the optimizer {path!r} is not an imported optimizer class; import its module first.")
    arguments = dict(description.get("init_args") or {})
    for name, value in arguments.items():
        if isinstance(value, str) and _is_optimizer(_imported(value)):
            arguments[name] = _imported(value)
    if isinstance(arguments.get("betas"), list):
        arguments["betas"] = tuple(arguments["betas"])
    return partial(kind, **arguments)


def _imported(path: str) -> Any:
    module_name, _, name = path.rpartition(".")
    if module_name == _OF_PEFT:
        import peft.optimizers  # noqa: F401
    return getattr(sys.modules.get(module_name), name, None)


def _is_optimizer(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Optimizer)


def _makes_optimizer_of_model(function: Any) -> bool:
    # Not any function that a checkpoint might name.
    if not inspect.isfunction(function) or not takes_model(function):
        return False
    try:
        return _is_optimizer(get_type_hints(function).get("return"))
    except Exception:  # An annotation may name what is not there at run time.
        return False


def make_optimizer(factory: OptimizerFactory, module: nn.Module, model: nn.Module, fuse: bool = True) -> Optimizer:
    """Makes the optimizer of the trainable parameters.

    Torch's Adam and AdamW step all parameters in one kernel on a CPU and on CUDA where nothing was said of how they
    step; what was said stays in the optimizer's ``defaults``.

    Args:
        factory: Makes it, of the parameters or of the model.
        module: Has all the parameters.
        model: The PEFT model in it.
        fuse: Whether the optimizer steps these very parameters, not something in their place.

    Raises:
        ConfigurationError: It does not take the arguments that it was given, cannot step with them, or leaves out
            trainable parameters.
    """
    of_model = takes_model(factory)
    try:
        optimizer = factory(model if of_model else [entry for entry in module.parameters() if entry.requires_grad])  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"the optimizer cannot be made ({error}); correct model.optimizer.") from error
    if type(optimizer).__module__.startswith(("torch.optim.", "transformers.", "bitsandbytes.")):
        _require_step(optimizer, next(module.parameters()).device)
    if fuse and _is_fusible(optimizer):
        for group in optimizer.param_groups:
            group["fused"] = True
    held = {id(entry) for group in optimizer.param_groups for entry in group["params"]}
    left_out = [name for name, entry in module.named_parameters() if entry.requires_grad and id(entry) not in held]
    if of_model and left_out:
        raise ConfigurationError(
            f"the optimizer that {_underlying(factory)[0].__name__} makes leaves out {len(left_out)} trainable "
            f"parameters, such as {left_out[0]!r}, which would not be trained; use another for model.optimizer."
        )
    return optimizer


def _is_fusible(optimizer: Optimizer) -> bool:
    """Whether an optimizer can step all parameters in one kernel, and nothing was said of how it steps them."""
    # Torch's SGD and Adagrad have such kernels too, not for sharded parameters or sparse gradients.
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or not is_fused_by_default(optimizer):
        return False
    for group in optimizer.param_groups:
        if any(group[name] not in (None, False) for name in ("fused", "foreach", "capturable", "differentiable")):
            return False
        if not all(each.is_floating_point() and each.device.type in ("cpu", "cuda") for each in group["params"]):
            return False
    return True


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
            f"the optimizer {kind.__name__} cannot step here ({error}); correct model.optimizer, or name another one."
        ) from error
