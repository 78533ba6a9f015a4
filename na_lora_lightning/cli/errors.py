"""Turns the parser's errors into one sentence that names the key, the reason and the remedy."""

from __future__ import annotations

import re
import traceback
from argparse import ArgumentParser
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from typing_extensions import override

from na_lora_lightning.errors import ConfigurationError, NALoRAError

# The parser's errors are texts and nothing else. A nested option's key comes after that of what it belongs to.
_KEY = re.compile(r'Parser key "([^"]*)":')
_REMEDY = "cannot be {value!r}; '--help' shows what it takes."
# What is said of a value, and how that is said here; the first that fits.
_SENTENCES = (
    (
        r"[Oo]ption '(?P<name>streaming|shuffle_buffer)' is not accepted",
        "the class given for {key!r} has no option {name!r}, which data for language models alone have; leave it out.",
    ),
    (
        r"[Oo]ption '(?P<name>validation_fraction|stopping_strategy)' is not accepted",
        "the class given for {key!r} has no option {name!r}, which data for language models alone have; leave it out, "
        "and give what is kept for validation as data.validation.",
    ),
    (
        r"[Oo]ption '(?P<name>[^']*)' is not accepted",
        "the class given for {key!r} has no option {name!r}; correct or remove it.",
    ),
    (
        r"the following arguments are required: (?P<name>\w+)(?P<more>[\w, ]*)",
        "the class or function given for {key!r} needs {name}{more}; give it as {key}.{name}, for example.",
    ),
    (
        r"expects a function or a callable class: (?P<reason>[^\n]*?)\.+ Got value",
        "the option {key!r} cannot be used: {reason}; give the import path of a class or function.",
    ),
    (
        r"\AExpected .* Got value: None\Z",
        "the option {key!r} is required; give it in the configuration or on the command line.",
    ),
    (
        r"\AExpected an? (?P<kind>.*)\. Got value: (?P<value>.*)\Z",
        "the option {key!r} is {value!r}, and must be {kind}; correct it.",
    ),
    (
        r"(?s)Subtypes: \[<class 'str'>, <class 'NoneType'>\]\s.*?Given value type: <class '(list|dict)'>\s+"
        r"Given value: (?P<value>[^\n]*)",
        "the option {key!r} is {value}, and must be one source, as data for language models alone take several; "
        "put the records into one file.",
    ),
    (
        r'Unable to load config "(?P<value>[^"]*)"',
        "the option {key!r} is a group of options, and {value!r} is no file that has them; give the one that is meant, "
        "such as {key}.NAME; '--help' lists them.",
    ),
    (
        # Where a number can be a tensor too, such as a learning rate, a class is hardly what was meant.
        r"(?s)\A(?!.*<class 'float'>).*Expected a dot import path string: (?P<value>\S+)",
        "the option {key!r} is {value!r}, which is not a known class; give its import path.",
    ),
    (r"G(ot|iven) value: (?!NestedArg)(?P<value>.*?)(\. Got value: .*)?$", "the option {key!r} " + _REMEDY),
    (r"NestedArg\(key='(?P<name>[^']*)', val='?(?P<value>.*?)'?\)", "the option '{key}.{name}' " + _REMEDY),
)
# Of a message that is quoted in full.
_LONGEST = 400


class CommandParser(ArgumentParser):
    """The parser of a command that trains nothing, whose errors end as those of all others."""

    @override
    def error(self, message: str) -> NoReturn:
        """Raises :class:`~na_lora_lightning.errors.ConfigurationError`."""
        raise ConfigurationError(f"{message}; see '{self.prog} --help'.")


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
    if unknown := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
        first = unknown[1]
        if first.startswith("-"):
            return unknown_key(first.lstrip("-").split("=")[0], known)
        return f"the argument {first!r} belongs to no option; put '--' and the option's name before it."
    if _KEY.match(message):
        return _explain_value(message, switches)
    return _sentence(message)


def unknown_key(key: str, known: Collection[str]) -> str:
    """Says that there is no such key, and which one was probably meant."""
    nearest = get_close_matches(key, known, n=1, cutoff=0.6)
    if not nearest:
        # The right name in the wrong group is a common slip.
        nearest = [name for name in sorted(known) if name.rpartition(".")[2] == key.rpartition(".")[2]][:1]
    remedy = f"did you mean {nearest[0]!r}?" if nearest else "'--help' lists them all."
    return f"there is no option {key!r}; {remedy}"


def _explain_value(message: str, switches: Collection[str]) -> str:
    keys = list(dict.fromkeys(_KEY.findall(message)))
    if keys[0] in switches:
        return f"the option {keys[0]!r} takes a group of options; to switch it off, set {keys[0]}.enabled to false."
    key, rest = ".".join(keys), _KEY.split(message)[-1].strip()
    for pattern, sentence in _SENTENCES:
        if match := re.search(pattern, rest, re.MULTILINE):
            found = match.groupdict()
            return sentence.format(key=key, **{**found, "kind": _kind(found.get("kind", ""))})
    return _sentence(f"{key}: {rest}" if key not in rest else rest)


def _kind(name: str) -> str:
    if name.startswith("typing.Literal["):
        return f"one of {name.removeprefix('typing.Literal[')[:-1]}"
    names = {"<class 'int'>": "a whole number", "<class 'float'>": "a number", "<class 'bool'>": "true or false"}
    return names.get(name, f"of type {name.removeprefix('<class ').removesuffix('>')}")


def _sentence(message: str) -> str:
    lines = [line.strip(" -") for line in message.splitlines()]
    return " ".join(line for line in lines if line).rstrip(".") + "."


@contextmanager
def errors_of_lightning(what: str, *also: type[Exception]) -> Iterator[None]:
    """Turns what Lightning itself raises into one sentence; errors of other code keep their traceback.

    Args:
        what: Begins the sentence, such as ``"the trainer cannot be made"``.
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
