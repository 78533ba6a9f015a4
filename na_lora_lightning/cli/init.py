"""``na-lora init``: configurations to begin with, their schema for editors, and completion for shells."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

from na_lora_lightning.cli.errors import CommandParser
from na_lora_lightning.errors import ConfigurationError

_PACKAGE = Path(__file__).parents[1]
TRAINING = ("fit", "validate", "test", "predict")


def shipped_configurations() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    # In a wheel they are in the package; in the repository beside it.
    folder = next(place for place in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if place.is_dir())
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def command_parser(command: str, configuration: Path | None = None) -> Any:
    """The parser of a subcommand that trains or evaluates, for a configuration, whose data may be of another class."""
    from na_lora_lightning.cli.training import NALoRACLI
    from na_lora_lightning.lightning_internals import parsers_of_commands

    class Ready(Exception):  # noqa: N818 - It is no error.
        pass

    class Parser(NALoRACLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise Ready(parsers_of_commands(self)[command])

    try:
        Parser(command, [command, *([] if configuration is None else ["--config", str(configuration)])])
    except Ready as ready:
        return ready.args[0]
    raise AssertionError(command)


def schema(configuration: Path) -> str:
    """The JSON schema of files such as a configuration of ``fit``.

    Raises:
        ConfigurationError: jsonargparse is too old to make one.
    """
    parser = command_parser("fit", configuration)
    if not hasattr(parser, "get_completion_script"):
        raise ConfigurationError("a schema needs jsonargparse 4.53; pip install --upgrade jsonargparse.")
    with _without_metaclasses():
        made = json.loads(parser.get_completion_script("jsonschema"))
    # A third as large without indentation.
    return json.dumps(made, separators=(",", ":")) + "\n"


@contextmanager
def _without_metaclasses() -> Iterator[None]:
    """Keeps jsonargparse 4.53 from asking a class of classes for its subclasses, which it cannot tell."""
    from jsonargparse import _completions_jsonschema as schemas

    paths = schemas.get_all_subclass_paths
    schemas.get_all_subclass_paths = lambda kind, *others: [] if issubclass(kind, type) else paths(kind, *others)
    try:
        yield
    finally:
        schemas.get_all_subclass_paths = paths


def completion(shell: str) -> str:
    """A script that has a shell complete commands and options.

    Raises:
        ConfigurationError: The package shtab, which makes it, is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise ConfigurationError("completion needs the package shtab; pip install shtab.") from error
    from na_lora_lightning.cli import chat, compare, inspect, merge, report

    parsers: dict[str, Any] = {name: command_parser(name) for name in TRAINING}
    others = {"chat": chat, "merge": merge, "report": report, "compare": compare, "inspect": inspect}
    parsers |= {name: module.options_parser() for name, module in others.items()}
    parsers["init"] = options_parser()
    root = argparse.ArgumentParser(prog="na-lora")
    commands = root.add_subparsers()
    for name, parser in parsers.items():
        commands.add_parser(name, help=name)
        commands.choices[name] = parser
    return str(shtab.complete(root, shell=shell)) + "\n"


def options_parser() -> CommandParser:
    """The parser of its options."""
    parser = CommandParser(
        prog="na-lora init",
        description="Write a configuration to begin with; without a name, list those that there are.",
    )
    parser.add_argument("name", nargs="?", help="which one")
    parser.add_argument("--output", type=Path, default=Path("run.yaml"), metavar="FILE", help="default: run.yaml")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    parser.add_argument(
        "--schema", action="store_true", help="write its JSON schema beside it, by which editors complete and check it"
    )
    parser.add_argument("--completion", choices=("bash", "zsh", "tcsh"), help="print a script for a shell, and no more")
    return parser


def main(arguments: list[str]) -> int:
    """Runs ``na-lora init``.

    Args:
        arguments: What follows ``init`` on the command line.

    Returns:
        0.

    Raises:
        ConfigurationError: There is no such configuration, or its file exists.
    """
    options = options_parser().parse_args(arguments)
    if options.completion is not None:
        print(completion(options.completion), end="")
        return 0
    shipped = shipped_configurations()
    if options.name is None:
        for name, file in shipped.items():
            print(f"{name:16} {_first_comment(file)}")
        print("\n'na-lora init NAME' writes one to run.yaml, for 'na-lora fit --config run.yaml'.")
        return 0
    if options.name not in shipped:
        raise ConfigurationError(f"there is no configuration {options.name!r}; use one of {', '.join(shipped)}.")
    beside = options.output.with_suffix(".schema.json")
    for file in (options.output, *([beside] if options.schema else [])):
        if file.exists() and not options.overwrite:
            raise ConfigurationError(f"the file {str(file)!r} exists; give another --output, or --overwrite.")
    text = shipped[options.name].read_text(encoding="utf-8")
    if options.schema:
        text = f"# yaml-language-server: $schema={beside.name}\n{text}"
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        if options.schema:
            beside.write_text(schema(shipped[options.name]), encoding="utf-8")
        options.output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{str(options.output)!r} cannot be written ({error.strerror}); give another.") from (
            error
        )
    print(f"Configuration {options.output}" + (f", schema {beside}" if options.schema else ""))
    return 0


def _first_comment(file: Path) -> str:
    line = file.read_text(encoding="utf-8").partition("\n")[0]
    return shorten(line.lstrip("# ").rstrip(":"), 62, placeholder=" …") if line.startswith("#") else ""
