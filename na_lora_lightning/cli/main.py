"""The command line ``na-lora``: picks the subcommand, and turns users' mistakes into one line.

What a subcommand needs is imported when it runs, so that ``na-lora --help`` is immediate.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from na_lora_lightning import __version__
from na_lora_lightning.errors import NALoRAError
from na_lora_lightning.versions import require_new_transformers

_HELP = """\
usage: na-lora [--help] [--version] COMMAND ...

Nonlinearity-aware LoRA: fine-tunes Hugging Face causal language models with PyTorch Lightning.

commands:
  fit       train a LoRA adapter; both mechanisms are on unless switched off
  validate  measure loss, perplexity and exact match on the validation data
  test      the same on the test data
  predict   generate answers to prompts
  chat      talk with a model, an adapter or the adapter of a run
  merge     merge an adapter into its base model
  inspect   list the gates of a model and how they would be adapted
  report    write a page about a run, or several side by side
  compare   train in several ways, and say which differences are more than chance
  init      write a configuration to begin with, its schema, or completion for a shell

'na-lora COMMAND --help' lists the options of a command. 'na-lora fit --config run.yaml' takes them from a file, and
'na-lora fit ... --print_config' shows the configuration that a command line amounts to.
"""

# Each is about something that a user of this package neither does nor can change.
_SILENCED_WARNINGS = (
    # Lightning calls its parser by names that the parser is retiring.
    r"\s*[^\n]*(was deprecated in v4\.\d+|JsonargparseDeprecationWarning)",
    # Records are tokenised beforehand, so no loading process would have anything to do.
    r"The '\w+_dataloader' does not have many workers",
    # Lightning and PEFT call torch and transformers by older names.
    r"`is_gradient_checkpointing` is deprecated",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # Every run has a folder of its own, a resumed one too.
    r"The dirpath has changed from",
    # The mechanisms act in training alone, and evaluation has no use for their state.
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
    # Averages are of the adapter alone.
    r"You're using the WeightAveraging callback with a model that overrides",
)
_TWIN = "pytorch_lightning"
_SILENCED_MESSAGES = ("💡 Tip", "TPU available", "Loading `train_dataloader` to estimate")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand.

    Args:
        arguments: The command line without the program's name; None stands for that of the process.

    Returns:
        The exit status: 0, or 2 if the user has something to correct, which is then on stderr in one line.
    """
    with unread_output_is_dropped():
        return _run(list(sys.argv[1:] if arguments is None else arguments))


def _run(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0 if given else 2
    if given[0] == "--version":
        print(f"na-lora {__version__}")
        return 0
    given = _with_command_first(given)
    command = _COMMANDS.get(given[0])
    if command is None:
        missing = "no command is given" if given[0].startswith("-") else f"there is no command {given[0]!r}"
        return _report(f"{missing}; use one of {', '.join(_COMMANDS)}.")
    try:
        with _without_known_noise():
            if given[0] not in _WITHOUT_TRANSFORMERS:
                require_new_transformers()
            return command(given)
    except NALoRAError as error:
        return _report(str(error))
    except SystemExit as exit_request:
        # Parsers exit by themselves after printing help or a configuration.
        return exit_request.code if isinstance(exit_request.code, int) else 0


def _with_command_first(given: list[str]) -> list[str]:
    """Moves options before the command, as in ``--config run.yaml fit``, behind it."""
    position = 0
    while position < len(given) and given[position].startswith("-"):
        position += 1 if "=" in given[position] else 2
    if position >= len(given):
        # Perhaps after an option without a value.
        position = next((place for place, argument in enumerate(given) if argument in _COMMANDS), 0)
    return [given[position], *given[:position], *given[position + 1 :]]


def _report(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _train(arguments: Sequence[str]) -> int:
    from na_lora_lightning.cli.adapters import with_adapter
    from na_lora_lightning.cli.arguments import functions_as_classes, in_sections
    from na_lora_lightning.cli.training import NALoRACLI

    given = with_adapter(in_sections(arguments, _COMMANDS))
    with functions_as_classes(given):
        NALoRACLI(given[0], given)
    return 0


def _merge(arguments: Sequence[str]) -> int:
    from na_lora_lightning.cli import merge as merging

    return merging.main(list(arguments[1:]))


def _inspect(arguments: Sequence[str]) -> int:
    from na_lora_lightning.cli import inspect as inspection

    return inspection.main(list(arguments[1:]))


def _init(arguments: Sequence[str]) -> int:
    from na_lora_lightning.cli import init as beginning

    return beginning.main(list(arguments[1:]))


def _chat(arguments: Sequence[str]) -> int:
    from na_lora_lightning.cli import chat as chatting

    return chatting.main(list(arguments[1:]))


def _report_runs(arguments: Sequence[str]) -> int:
    from na_lora_lightning.cli import report as reporting

    return reporting.main(list(arguments[1:]))


def _compare(arguments: Sequence[str]) -> int:
    from na_lora_lightning.cli import compare as comparing

    return comparing.main(list(arguments[1:]))


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "fit": _train,
    "validate": _train,
    "test": _train,
    "predict": _train,
    "chat": _chat,
    "merge": _merge,
    "inspect": _inspect,
    "init": _init,
    "report": _report_runs,
    "compare": _compare,
}
_WITHOUT_TRANSFORMERS = ("report", "init")


class _KnownMessages(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_SILENCED_MESSAGES)


@contextmanager
def _without_known_noise() -> Iterator[None]:
    # Under the second name where something else in the process has imported pytorch_lightning.
    loggers = [logging.getLogger(f"{package}.utilities.rank_zero") for package in ("lightning.pytorch", _TWIN)]
    messages = _KnownMessages()
    for logger in loggers:
        logger.addFilter(messages)
    try:
        with warnings.catch_warnings():
            for pattern in _SILENCED_WARNINGS:
                warnings.filterwarnings("ignore", message=pattern)
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(messages)


class _Stream:
    """A stream whose text goes nowhere once nobody reads it, so that the work goes on."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except BrokenPipeError:
            self._leave()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._leave()

    def _leave(self) -> None:
        # For whoever else writes there, and for what waits in buffers until the interpreter ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unread_output_is_dropped() -> Iterator[None]:
    """Lets a command go on to its end when the reader of its output stops, as ``head`` does."""
    streams = sys.stdout, sys.stderr
    output, errors = (stream and _Stream(stream) for stream in streams)
    sys.stdout, sys.stderr = output, errors
    try:
        yield
    finally:
        for stream in (output, errors):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = streams
