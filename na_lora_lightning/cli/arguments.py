"""Arguments of the command line before and after the parser: classes of data, switches, shared settings."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import yaml
from jsonargparse import Namespace

from na_lora_lightning.cli.errors import explain, read_yaml
from na_lora_lightning.errors import ConfigurationError

_SWITCH_WORDS = ("true", "false")


def names_data_class(arguments: Sequence[str]) -> bool:
    """Whether a class of data modules is asked for, on the command line or in a configuration file."""
    if any(argument.partition("=")[0] in ("--data", "--data.class_path") for argument in arguments):
        return True
    return any("class_path" in data for data in data_of_files(arguments).values())


def require_init_args(arguments: Sequence[str]) -> None:
    """Refuses options of a data module beside its class."""
    for file, data in data_of_files(arguments).items():
        stray = next((name for name in data if name not in ("class_path", "init_args")), None)
        if stray is not None:
            raise ConfigurationError(
                f"The option 'data.{stray}' of {file!r} is beside the class of the data and not among its arguments; "
                "write it under data.init_args, after data.class_path."
            )


def data_of_files(arguments: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """The options of the data in each configuration file that has any."""
    found: dict[str, Mapping[str, Any]] = {}
    for file in config_files(arguments):
        content = read_yaml(file)
        data = content.get("data") if isinstance(content, Mapping) else None
        if isinstance(data, (str, Mapping)):
            found[file] = {"class_path": data} if isinstance(data, str) else data
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
    for setting in ("observer", "allow_unmasked_gates", "example_inputs"):
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
