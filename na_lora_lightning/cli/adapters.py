"""Adapters on the command line: ``--adapter``, and the base model that one names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from na_lora_lightning.checkpoints.adapter_folder import find_base
from na_lora_lightning.cli.arguments import names_class, names_option
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.models.saved_adapter import adapter_folder, read_adapter_config

_OPTION = "--adapter"


def base_of_adapter(folder: Path) -> tuple[str, str | None]:
    """The base model that an adapter names, and its revision.

    Raises:
        ConfigurationError: It names none.
    """
    config = read_adapter_config(folder)
    base = find_base(config.get("base_model_name_or_path") or "", folder)
    if not base:
        raise ConfigurationError(f"the adapter {str(folder)!r} does not name its base model; give it by name.")
    return base, config.get("revision")


def with_adapter(arguments: Sequence[str]) -> list[str]:
    """Lets ``--adapter FOLDER`` mean ``--model.adapter.start FOLDER``, with the base model that the adapter names.

    Args:
        arguments: The command line, beginning with the subcommand.

    Returns:
        The same, with the base model where no other is given.

    Raises:
        ConfigurationError: There is no such adapter, or a checkpoint is given beside it.
    """
    given: list[str] = []
    place: str | None = None
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if option == _OPTION:
            place = value if equals else next(rest, "")
        else:
            given.append(argument)
    if place is None:
        return given
    if not place:
        raise ConfigurationError("--adapter needs the folder of an adapter or of a run; give it.")
    folder = adapter_folder(place)
    if given[0] != "fit" and names_option(given, "ckpt_path"):
        raise ConfigurationError(
            f"both the adapter {place!r} and a checkpoint are given, and one model has one adapter; give --adapter or "
            "--ckpt_path."
        )
    model = "model.init_args" if names_class(given, "model") else "model"
    options = [f"--{model}.adapter.start={folder}"]
    if not names_option(given, "model.model_name_or_path"):
        base, revision = base_of_adapter(folder)
        options.append(f"--{model}.model_name_or_path={base}")
        options += [] if revision is None else [f"--{model}.revision={revision}"]
    # After the files, which may name the model's class.
    return [*given, *options]
