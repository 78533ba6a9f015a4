"""Functions that make an optimizer, on the command line: they take options as classes of optimizers do."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from jsonargparse import class_from_function
from torch.optim import Optimizer

from na_lora_lightning.cli.arguments import config_files
from na_lora_lightning.cli.errors import read_yaml
from na_lora_lightning.modules.optimization import takes_model

_OPTION = "--model.optimizer"


@contextmanager
def functions_as_classes(arguments: Sequence[str]) -> Iterator[None]:
    """Has the parser see a class where the function is that ``model.optimizer`` names.

    The parser gives options to classes alone, and leaves the first argument, which is the model here, to the fit.

    Args:
        arguments: The command line.
    """
    replaced: list[tuple[Any, str, Any]] = []
    try:
        for path in sorted(_named(arguments)):
            module_name, _, name = path.rpartition(".")
            try:
                module = import_module(module_name)
            except (ImportError, ValueError):
                # The parser says so, and names the option.
                continue
            function = getattr(module, name, None)
            if inspect.isfunction(function) and takes_model(function):
                replaced.append((module, name, function))
                setattr(module, name, _class_of(function, module_name, name))
        yield
    finally:
        for module, name, function in replaced:
            setattr(module, name, function)


def _class_of(function: Any, module_name: str, name: str) -> type[Optimizer]:
    kind = class_from_function(function, Optimizer, name="_Made")
    # It would be kept here for the next function.
    del globals()["_Made"]
    kind.__module__, kind.__name__, kind.__qualname__ = module_name, name, name
    return kind


def _named(arguments: Sequence[str]) -> set[str]:
    """What the command line and its files name as the optimizer."""
    found: set[Any] = set()
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = argument.partition("=")
        if option in (_OPTION, f"{_OPTION}.class_path"):
            found.add(_path_of(read_yaml(value if equals else following) or (value if equals else following)))
    for file in config_files(arguments):
        content = read_yaml(file)
        model = content.get("model") if isinstance(content, Mapping) else None
        if isinstance(model, Mapping):
            found.add(_path_of(model.get("optimizer")))
    return {path for path in found if isinstance(path, str) and "." in path}


def _path_of(value: Any) -> Any:
    return value.get("class_path") if isinstance(value, Mapping) else value
