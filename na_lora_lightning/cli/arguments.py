"""Arguments around the parser: classes of data, switches, functions that make an optimizer, and the help's order."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace, _typehints, class_from_function
from torch.optim import Optimizer
from typing_extensions import override

from na_lora_lightning.cli.errors import explain, read_yaml
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.modules.optimization import takes_model

_SWITCH_WORDS = ("true", "false")


def names_class(arguments: Sequence[str], group: str) -> bool:
    """Whether a class is asked for, of the model or of the data, on the command line or in a configuration file."""
    if any(argument.partition("=")[0] in (f"--{group}", f"--{group}.class_path") for argument in arguments):
        return True
    return any("class_path" in options for options in group_of_files(arguments, group).values())


def require_init_args(arguments: Sequence[str], group: str) -> None:
    """Refuses options of a class beside its name."""
    for file, options in group_of_files(arguments, group).items():
        stray = next((name for name in options if name not in ("class_path", "init_args")), None)
        if stray is not None:
            raise ConfigurationError(
                f"the option '{group}.{stray}' of {file!r} is beside the class of the {group} and not among its "
                f"arguments; write it under {group}.init_args, after {group}.class_path."
            )


def group_of_files(arguments: Sequence[str], group: str) -> dict[str, Mapping[str, Any]]:
    """The options of the model or the data in each configuration file that has any."""
    found: dict[str, Mapping[str, Any]] = {}
    for file in config_files(arguments):
        content = read_yaml(file)
        options = content.get(group) if isinstance(content, Mapping) else None
        if isinstance(options, (str, Mapping)):
            found[file] = {"class_path": options} if isinstance(options, str) else options
    return found


def with_switches(arguments: Sequence[str], names: Iterable[str]) -> list[str]:
    """Lets ``--gate_importance false`` mean ``--gate_importance.enabled false``."""
    switches = tuple(f"--{name}" for name in names)
    expanded = []
    for argument, value in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, own_value = argument.partition("=")
        is_switch = option in switches and (own_value if equals else value) in _SWITCH_WORDS
        expanded.append(f"{option}.enabled{equals}{own_value}" if is_switch else argument)
    return expanded


def expand_switches(config: Namespace, defaults: Namespace, names: Collection[str]) -> None:
    """Turns ``gate_importance: false`` of a configuration file into the group with its switch off."""
    for name in names:
        value = config[name]
        if isinstance(value, Namespace):
            continue
        if value not in (None, True, False):
            raise ConfigurationError(explain(f'Parser key "{name}":', (), names, ()))
        config[name] = defaults[name].clone()
        config[name]["enabled"] = bool(value)


def share_settings(config: Namespace, defaults: Namespace, pair: tuple[str, str]) -> None:
    """Gives both mechanisms, which find and observe gates together, what was set for one of them."""
    for setting in ("observer", "allow_unmasked_gates", "example_inputs", "view"):
        for given, other in (pair, pair[::-1]):
            untouched = config[other][setting] == defaults[other][setting]
            if untouched and config[given][setting] != defaults[given][setting]:
                config[other][setting] = config[given][setting]


def in_sections(arguments: Sequence[str], commands: Collection[str]) -> list[str]:
    """Takes the part of a subcommand from configuration files that have one for each.

    Args:
        arguments: The command line, beginning with the subcommand.
        commands: All subcommands.

    Returns:
        The same, with the text of that part in the place of such a file.
    """
    replaced = list(arguments)
    for file in config_files(arguments):
        content = read_yaml(file)
        if isinstance(content, Mapping) and content and set(content) <= set(commands):
            part = yaml.safe_dump(content.get(arguments[0]) or {}) + "\n"
            names = ("--config", "-c")
            replaced = [
                part if argument == file and former in names else argument
                for former, argument in zip(["", *replaced], replaced, strict=False)
            ]
            replaced = [
                f"--config={part}" if argument in [f"{n}={file}" for n in names] else argument for argument in replaced
            ]
    return replaced


def config_files(arguments: Sequence[str]) -> list[str]:
    """The configuration files that the command line names."""
    files = []
    for position, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option in ("-c", "--config"):
            files += [value] if value else list(arguments[position + 1 : position + 2])
    return files


_VARIABLES = "NA_LORA"


def parser_settings() -> dict[str, Any]:
    """How parsers are made: errors are rewritten, and an abbreviation is a misspelling more often than not.

    Options are taken from the environment where it has any, which would make help twice as long.
    """
    takes_environment = any(name.startswith(f"{_VARIABLES}_") for name in os.environ)
    environment = {"default_env": True, "env_prefix": _VARIABLES} if takes_environment else {}
    return {"exit_on_error": False, "allow_abbrev": False, **environment}


def variable(command: str, option: str) -> str:
    """The environment variable of an option: ``NA_LORA_FIT__TRAINER__MAX_STEPS`` of ``trainer.max_steps``."""
    return f"{_VARIABLES}_{command}__{option.replace('.', '__')}".upper()


def require_known_variables(command: str, options: Iterable[str]) -> None:
    """Refuses environment variables that look like options of a command and are none.

    Raises:
        ConfigurationError: There is one.
    """
    known = {variable(command, option) for option in options}
    given = [name for name in os.environ if name.startswith(variable(command, "")) and name not in known]
    if given:
        nearest = get_close_matches(given[0], known, n=1)
        raise ConfigurationError(
            f"the environment variable {given[0]} is no option of 'na-lora {command}'; "
            + (f"did you mean {nearest[0]}?" if nearest else "unset it.")
        )


def names_option(arguments: Sequence[str], option: str) -> bool:
    """Whether an option such as ``model.revision`` has a value, here, in a configuration file or the environment."""
    if variable(arguments[0], option) in os.environ:
        return True
    if any(argument.partition("=")[0] == f"--{option}" for argument in arguments):
        return True
    group, _, name = option.partition(".")
    if not name:
        return any(
            isinstance(read_yaml(file), Mapping) and option in read_yaml(file) for file in config_files(arguments)
        )
    options = group_of_files(arguments, group).values()
    return any(name in given or name in (given.get("init_args") or {}) for given in options)


_OPTION = "--model.optimizer"
_RESOLVE = "resolve_class_path_by_name"


@contextmanager
def functions_as_classes(arguments: Sequence[str]) -> Iterator[None]:
    """Has the parser see a class where the function is that ``model.optimizer`` names, and torch's in a bare name.

    The parser gives options to classes alone, and leaves the first argument, which is the model here, to the fit. To a
    name such as ``AdamW`` it takes exception where another package, such as bitsandbytes, has an optimizer called so.

    Args:
        arguments: The command line.
    """
    replaced: list[tuple[Any, str, Any]] = []
    # Not public: without it a name that several packages use is ambiguous, and the parser says so.
    resolve = getattr(_typehints, _RESOLVE, None)
    if resolve is not None:
        replaced.append((_typehints, _RESOLVE, resolve))
        setattr(_typehints, _RESOLVE, lambda kind, name: _of_torch(kind, name) or resolve(kind, name))
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


def _of_torch(kind: Any, name: str) -> str | None:
    is_torchs = kind in (Optimizer, (Optimizer,)) and inspect.isclass(getattr(torch.optim, name, None))
    return f"torch.optim.{name}" if is_torchs else None


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
        if option.replace(".init_args.optimizer", ".optimizer", 1) in (_OPTION, f"{_OPTION}.class_path"):
            found.add(_path_of(read_yaml(value if equals else following) or (value if equals else following)))
    for model in group_of_files(arguments, "model").values():
        found |= {_path_of(options.get("optimizer")) for options in (model, model.get("init_args") or {})}
    return {path for path in found if isinstance(path, str) and "." in path}


def _path_of(value: Any) -> Any:
    return value.get("class_path") if isinstance(value, Mapping) else value


DESCRIPTIONS = {
    "fit": "Trains a LoRA adapter; both mechanisms are on unless switched off.",
    "validate": "Measures loss, perplexity and exact match on the validation data.",
    "test": "Measures loss, perplexity and exact match on the test data.",
    "predict": "Generates answers to prompts.",
}
# Groups whose titles come from docstrings of Lightning's.
_TITLES = {"trainer": "Lightning's Trainer", **dict.fromkeys(DESCRIPTIONS, "The checkpoint to start from")}
# Of docstrings: a role such as :class:`~package.module.Name`, and a literal.
_ROLE = re.compile(r":[\w:]+:`~?(?:[\w.]+\.)?([^`<]+?)(?:\s*<[^`>]*>)?`", re.ASCII)
_LITERAL = re.compile(r"``(.+?)``|`([^`<]+?)(?:\s*<([^`>]*)>)?`_{0,2}", re.DOTALL)


class PlainParser(ArgumentParser):
    """A parser whose help can be read in a terminal."""

    @override
    def format_help(self, *arguments: Any, **options: Any) -> str:
        """Puts the groups of options in order and takes the markup out of all texts."""
        groups = self.groups or {}
        for name, group in groups.items():
            title = _TITLES.get(name) or " ".join((plain(group.title) or "").split())
            group.title = f"{title.removesuffix(f' ({name})')} ({name})"
        for action in self._actions:
            action.help = plain(action.help)
        # A stable order, so that those of the trainer go last and all others stay.
        self._action_groups = sorted(self._action_groups, key=lambda group: group is groups.get("trainer"))
        text: str = super().format_help(*arguments, **options)
        return text


def plain(text: str | None) -> str | None:
    """Text without the markup of Sphinx: of a role the last part of its name, of a literal what is in it."""
    if not text:
        return text
    return _LITERAL.sub(
        lambda match: match[1] or match[2] + (f" ({match[3]})" if match[3] else ""),
        _ROLE.sub(r"\1", text),
    )
