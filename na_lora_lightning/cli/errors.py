"""Turns the parser's errors into one sentence that names the key, the reason and the remedy."""

from __future__ import annotations

import re
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from na_lora_lightning.errors import ConfigurationError, NALoRAError

_KEY = re.compile(r'Parser key "(?P<key>[^"]*)":\s*(?P<rest>.*)', re.DOTALL)
_UNKNOWN_OPTION = re.compile(r"does not accept option '(?P<key>[^']*)'")
_UNKNOWN_ARGUMENT = re.compile(r"unrecognized arguments: (?P<arguments>.*)", re.DOTALL)
_UNKNOWN_IN_CLASS = re.compile(r"[Oo]ption '(?P<option>[^']*)' is not accepted")
_REQUIRED = re.compile(r"the following arguments are required: (?P<names>[\w, ]+)")
_NO_FACTORY = re.compile(r"expects a function or a callable class: (?P<reason>[^\n]*?)\.+ Got value")
_EXPECTED = re.compile(r"Expected an? (?P<kind>.*?)\. Got value: (?P<value>.*)", re.DOTALL)
_NO_CLASS = re.compile(r"Expected a dot import path string: (?P<value>\S+)")
_GIVEN = re.compile(r"Given value: (?P<value>.*)\Z", re.DOTALL)
_NESTED = re.compile(r"NestedArg\(key='(?P<key>[^']*)', val='?(?P<value>.*?)'?\)")
# Of a message that is quoted in full.
_LONGEST = 400
_CHOICES = re.compile(r"typing\.Literal\[(?P<choices>.*)\]")


def explain(message: str, known: Collection[str], switches: Collection[str], config_files: Sequence[str]) -> str:
    """Rewrites an error message of jsonargparse.

    Args:
        message: What it says, often over many lines.
        known: All keys of the parser, such as ``trainer.max_epochs``.
        switches: Groups that have a key ``enabled``.
        config_files: Configuration files of the command line.

    Returns:
        One sentence.
    """
    # A misspelt key in a file is the cause of a later complaint that its value is missing.
    for file in config_files:
        for key in _keys_of_file(file, known):
            return unknown_key(key, known)
    if match := _UNKNOWN_OPTION.search(message):
        return unknown_key(match["key"], known)
    if match := _UNKNOWN_ARGUMENT.search(message):
        first = match["arguments"].split()[0]
        if first.startswith("-"):
            return unknown_key(first.lstrip("-").split("=")[0], known)
        return f"The argument {first!r} belongs to no option; put '--' and the option's name before it."
    if match := _KEY.match(message):
        return _explain_value(match["key"], match["rest"], switches)
    return _sentence(message)


def unknown_key(key: str, known: Collection[str]) -> str:
    """Says that there is no such key, and which one was probably meant."""
    nearest = get_close_matches(key, known, n=1, cutoff=0.6)
    if not nearest:
        # The right name in the wrong group is a common slip.
        nearest = [name for name in sorted(known) if name.rpartition(".")[2] == key.rpartition(".")[2]][:1]
    remedy = f"did you mean {nearest[0]!r}?" if nearest else "'--help' lists them all."
    return f"There is no option {key!r}; {remedy}"


def _explain_value(key: str, rest: str, switches: Collection[str]) -> str:
    if key in switches:
        return f"The option {key!r} takes a group of options; to switch it off, set {key}.enabled to false."
    if match := _UNKNOWN_IN_CLASS.search(rest):
        return f"The class given for {key!r} has no option {match['option']!r}; correct or remove it."
    if match := _REQUIRED.search(rest):
        names = match["names"].strip()
        return f"The class or function given for {key!r} needs {names}; give it as {key}.{names.split(',')[0]}, say."
    if match := _NO_FACTORY.search(rest):
        return f"The option {key!r} cannot be used: {match['reason']}; give the import path of a class or function."
    if match := _EXPECTED.match(rest):
        value = match["value"].strip()
        if value == "None":
            return f"The option {key!r} is required; give it in the configuration or on the command line."
        return f"The option {key!r} is {value!r}, and must be {_kind(match['kind'])}; correct it."
    if match := _NO_CLASS.search(rest):
        return f"The option {key!r} is {match['value']!r}, which is no known class; give its import path."
    if match := _GIVEN.search(rest):
        value = match["value"].strip()
        if nested := _NESTED.fullmatch(value):
            key, value = f"{key}.{nested['key']}", nested["value"]
        return f"The option {key!r} cannot be {value!r}; '--help' shows what it takes."
    return _sentence(f"{key}: {rest}" if key not in rest else rest)


def _kind(name: str) -> str:
    if match := _CHOICES.match(name):
        return f"one of {match['choices']}"
    names = {"<class 'int'>": "a whole number", "<class 'float'>": "a number", "<class 'bool'>": "true or false"}
    return names.get(name, f"of type {name.removeprefix('<class ').removesuffix('>')}")


def _sentence(message: str) -> str:
    lines = [line.strip(" -") for line in message.splitlines()]
    return " ".join(line for line in lines if line).rstrip(".") + "."


@contextmanager
def errors_of_lightning(what: str, *also: type[Exception]) -> Iterator[None]:
    """Turns what Lightning itself raises into one sentence; errors of other code keep their traceback.

    Args:
        what: Begins the sentence, such as ``"The trainer cannot be made"``.
        *also: Errors to be treated alike whoever raises them.

    Raises:
        ConfigurationError: Lightning refused something.
    """
    try:
        yield
    except (NALoRAError, Warning):
        raise
    except Exception as error:
        cause = _deepest(error)
        if isinstance(cause, NALoRAError):
            raise cause from None
        if not isinstance(cause, also) and not _is_raised_by_lightning(cause):
            raise
        raise ConfigurationError(f"{what}: {in_one_sentence(cause)}.") from error


def in_one_sentence(error: BaseException) -> str:
    """The first line of an error's message, its sentences joined, without the full stop."""
    # A KeyError shows its message as a quoted name.
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    line = next((line.strip() for line in message.splitlines() if line.strip()), type(error).__name__)
    joined = line.replace(". HINT: Try running", "; try").replace(". ", "; ").rstrip(".:")
    return joined if len(joined) <= _LONGEST else line.split(". ")[0].rstrip(".:")


def _deepest(error: BaseException) -> BaseException:
    # The parser puts what a class says into a report of everything else that the value is not.
    while isinstance(error, ValueError) and error.__cause__ is not None and not isinstance(error, NALoRAError):
        error = error.__cause__
    return error


def _is_raised_by_lightning(error: BaseException) -> bool:
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(names) and names[-1].partition(".")[0] in ("lightning", "lightning_fabric", "lightning_utilities")


def read_yaml(file: str) -> Any:
    """What a configuration file, or a text in the place of one, holds; None if that cannot be told."""
    try:
        text = file if "\n" in file or file.lstrip().startswith("{") else Path(file).read_text(encoding="utf-8")
        return yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _keys_of_file(file: str, known: Collection[str]) -> Iterator[str]:
    content = read_yaml(file)
    if isinstance(content, Mapping):
        yield from _unknown_in(content, "", known)


def _unknown_in(content: Mapping[Any, Any], prefix: str, known: Collection[str]) -> Iterator[str]:
    for name, value in content.items():
        key = f"{prefix}{name}"
        is_group = any(other.startswith(f"{key}.") for other in known)
        if not is_group and key not in known:
            yield key
        elif is_group and isinstance(value, Mapping):
            yield from _unknown_in(value, f"{key}.", known)
