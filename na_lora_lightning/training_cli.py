"""The subcommands that run a trainer: fit, validate, test and predict."""

from __future__ import annotations

import errno
import json
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from na_lora_lightning.callbacks.fit_summary import FitSummaryCallback
from na_lora_lightning.callbacks.gate_importance import GateImportanceCallback
from na_lora_lightning.callbacks.run_checkpoint import ResumableCurves, RunCheckpoint
from na_lora_lightning.callbacks.step_scale import StepScaleCallback
from na_lora_lightning.checkpointing import AtomicCheckpointIO
from na_lora_lightning.cli_errors import explain, read_yaml
from na_lora_lightning.data import InstructionDataModule
from na_lora_lightning.errors import CheckpointError, ConfigurationError, NALoRAError
from na_lora_lightning.model_loading import BaseModelSource, one_line, require_model
from na_lora_lightning.module import NALoRALightningModule
from na_lora_lightning.resuming import (
    continue_last_run,
    last_checkpoint,
    newest_checkpoint,
    output_folders,
    require_writable,
)

# Callbacks of every fit, each with its own group of options beside a switch.
CALLBACKS: dict[str, type[Callback]] = {
    "gate_importance": GateImportanceCallback,
    "step_scale": StepScaleCallback,
    "fit_summary": FitSummaryCallback,
    "checkpoint": RunCheckpoint,
}
_MECHANISMS = ("gate_importance", "step_scale")

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 3,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    # Measures the base model on the whole validation data, for the summary's "before".
    "num_sanity_val_steps": -1,
}

# Errors are rewritten, and an abbreviation is a misspelling more often than not.
_PARSER = {"exit_on_error": False, "allow_abbrev": False}
_SWITCH_WORDS = ("true", "false")
_CHECKPOINT_WORDS = ("best", "last", "hpc", "registry")
# What a disk, not a program, does wrong.
_STORAGE_ERRORS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EACCES", "EPERM", "ENOTDIR", "ESTALE")
    if hasattr(errno, name)
}


class NALoRACLI(LightningCLI):
    """A ``LightningCLI`` for one subcommand, with the two mechanisms as option groups of their own.

    ``gate_importance``, ``step_scale``, ``fit_summary`` and ``checkpoint`` are callbacks of every fit, whatever
    ``trainer.callbacks`` says, unless their ``enabled`` is false; a checkpoint callback that is listed there takes the
    place of ``checkpoint``. With ``--ckpt_path last`` the last run goes on in its own folder. The data module is
    ``InstructionDataModule``, or the class that ``--data`` or ``data.class_path`` names; its tokenizer or processor is
    the model's. Options always come from the configuration, also with ``--ckpt_path``; a checkpoint of another model or
    LoRA is refused.

    Args:
        subcommand: ``fit``, ``validate``, ``test`` or ``predict``.
        arguments: The command line, beginning with ``subcommand``.
    """

    def __init__(self, subcommand: str, arguments: Sequence[str]) -> None:
        # Lightning sets it too late for what is overridden here.
        self.subcommand = self._requested = subcommand
        self._full_config: Namespace | None = None
        names_data_class = _names_data_class(arguments)
        if names_data_class:
            _require_init_args(arguments)
        super().__init__(
            NALoRALightningModule,
            LightningDataModule if names_data_class else InstructionDataModule,
            subclass_mode_data=names_data_class,
            save_config_kwargs={"overwrite": True},
            trainer_defaults=dict(TRAINER_DEFAULTS),
            seed_everything_default=0,
            parser_kwargs={"prog": "na-lora", **_PARSER, subcommand: dict(_PARSER)},
            args=list(arguments),
            auto_configure_optimizers=False,
            # The module describes itself in checkpoints the same way wherever it was made.
            load_from_checkpoint_support=False,
        )

    @override
    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only what was asked for: a parser takes a second to make."""
        return {self._requested: LightningCLI.subcommands()[self._requested]}

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the callbacks, and makes the data follow the model."""
        for name, kind in CALLBACKS.items():
            parser.add_lightning_class_args(kind, name)
            parser.add_argument(f"--{name}.enabled", type=bool, default=True, help=f"Whether fit uses {kind.__name__}.")
        group, readers = "data", ["tokenizer"]
        if self.subclass_mode_data:
            # A class is not handed what it has no use for.
            group, readers = "data.init_args", ["tokenizer", "processor"]
        for reader in readers:
            parser.link_arguments("model.model_name_or_path", f"{group}.{reader}_name_or_path")
            parser.link_arguments("model.revision", f"{group}.{reader}_revision")
        parser.link_arguments("model.trust_remote_code", f"{group}.trust_remote_code")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, and says what is wrong in one sentence.

        Raises:
            ConfigurationError: The arguments or a configuration file are wrong.
        """
        parser_of_command = self._subcommand_parsers[self._requested]
        try:
            # Lightning's own method does this too, and warns of arguments that are not those of the process.
            self.config = parser.parse_args(_with_switches(args))
        except ArgumentError as error:
            keys = {action.dest for action in parser_of_command._actions if not action.dest.endswith(".help")}
            raise ConfigurationError(explain(str(error), keys, CALLBACKS, _config_files(args))) from error
        _expand_switches(self.config[self._requested], parser_of_command.get_defaults())
        _share_settings(self.config[self._requested], parser_of_command.get_defaults())

    @override
    def _parse_ckpt_path(self) -> None:
        # Lightning would put the checkpoint's options over those that the user gives now.
        path = self._get(self.config, "ckpt_path")
        if path and path not in _CHECKPOINT_WORDS and "://" not in path and not Path(path).exists():
            raise ConfigurationError(f"The checkpoint {path!r} does not exist; correct ckpt_path.")
        if path == "best":
            raise ConfigurationError(
                "ckpt_path is 'best', which is known only while a fit runs; give the path of the checkpoint, or 'last'."
            )

    @override
    def before_instantiate_classes(self) -> None:
        """Fails on a model that cannot be had before data is prepared."""
        model = self._get(self.config, "model")
        require_model(BaseModelSource(model.model_name_or_path, revision=model.revision))

    @override
    def instantiate_classes(self) -> None:
        """Makes module, data and trainer."""
        self._full_config = self.config
        self.config = self.config.clone()
        # The switches are of the command line, not of the callbacks.
        for name in CALLBACKS:
            del self.config[self._requested][name]["enabled"]
        try:
            super().instantiate_classes()
        except ValueError as error:
            # The parser puts what a named class says into a report of everything else that the value is not.
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, NALoRAError):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Makes the trainer with the callbacks that are switched on."""
        assert self._full_config is not None
        self.config = self._full_config
        options = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        listed = options.get("callbacks") or []
        listed = listed if isinstance(listed, list) else [listed]
        _refuse_twice(listed)
        added: list[Callback] = []
        if self._requested == "fit":
            enabled = [name for name in CALLBACKS if self._get(self.config, name)["enabled"]]
            if options.get("enable_checkpointing") is False or any(isinstance(c, Checkpoint) for c in listed):
                enabled = [name for name in enabled if name != "checkpoint"]
            elif "checkpoint" not in enabled:
                options["enable_checkpointing"] = False
            added += [self._get(self.config_init, name) for name in enabled]
            if not set(enabled) & set(_MECHANISMS):
                rank_zero_info("gate_importance and step_scale are switched off: this is plain LoRA.")
            if options.get("logger") is not False and not any(isinstance(c, LearningRateMonitor) for c in listed):
                added.append(LearningRateMonitor(logging_interval="step"))
            self._curves = ResumableCurves()
            added.append(self._curves)
        options["plugins"] = _with_checkpoint_io(options.get("plugins"))
        try:
            return self._instantiate_trainer(options, added)
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise ConfigurationError(f"The trainer cannot be made: {one_line(error)}.") from error

    @override
    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Fails where nothing can be written, and finds the checkpoint that ``last`` means."""
        require_writable(output_folders(self.trainer))
        options: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        if options.get("ckpt_path") == "last":
            if subcommand == "fit":
                options["ckpt_path"] = continue_last_run(self.trainer)
                self._curves.starts_over = options["ckpt_path"] is None
            else:
                options["ckpt_path"] = last_checkpoint(self.trainer)
        return options

    def fit(self, model: NALoRALightningModule, **options: Any) -> None:
        """Trains, and says how to go on if training is stopped from outside."""
        with self._stopped_from_outside(), _quiet_writers():
            self.trainer.fit(model, **options)

    @contextmanager
    def _stopped_from_outside(self) -> Iterator[None]:
        try:
            yield
        except SystemExit as request:
            if not self.trainer.interrupted:
                raise
            number = signal.SIGTERM if isinstance(request, SIGTERMException) else signal.SIGINT
            if self.trainer.is_global_zero:
                steps = self.trainer.global_step
                print(f"Stopped by {number.name} after {steps} optimizer steps; {self._way_on()}.", file=sys.stderr)
            # What a shell reports of a command that a signal ended.
            raise SystemExit(128 + number) from request
        except OSError as error:
            if error.errno not in _STORAGE_ERRORS:
                raise
            place = f" {error.filename!r}" if error.filename else " logs"
            raise CheckpointError(
                f"Writing{place} failed after {self.trainer.global_step} optimizer steps ({error.strerror}); make room "
                f"or choose another folder, then {self._way_on()}."
            ) from error

    def _way_on(self) -> str:
        checkpoint = newest_checkpoint(self.trainer)
        if checkpoint is None:
            return "there is no checkpoint yet, so begin again"
        return f"go on with --ckpt_path last, which is {checkpoint!r}"

    def predict(self, model: NALoRALightningModule, **options: Any) -> None:
        """Predicts, and writes the answers beside their prompts."""
        answers = self.trainer.predict(model, **{**options, "return_predictions": True}) or []
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        suffix = f"-{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
        path = folder / f"predictions{suffix}.jsonl"
        loader = self.trainer.predict_dataloaders
        assert loader is not None
        _write_predictions(path, loader, answers)
        print(f"Predictions {path}")


def _with_checkpoint_io(plugins: Any) -> list[Any]:
    """Adds the plugin that writes checkpoints, unless another one is given."""
    given = list(plugins) if isinstance(plugins, (list, tuple)) else [] if plugins is None else [plugins]
    return given if any(isinstance(plugin, CheckpointIO) for plugin in given) else [*given, AtomicCheckpointIO()]


@contextmanager
def _quiet_writers() -> Iterator[None]:
    """Keeps threads that write logs from printing the traceback of an error that the trainer raises too."""
    former = threading.excepthook

    def report(arguments: Any) -> None:
        if not (isinstance(arguments.exc_value, OSError) and arguments.exc_value.errno in _STORAGE_ERRORS):
            former(arguments)

    threading.excepthook = report
    try:
        yield
    finally:
        threading.excepthook = former


def _names_data_class(arguments: Sequence[str]) -> bool:
    """Whether a class of data modules is asked for, on the command line or in a configuration file."""
    if any(argument.partition("=")[0] in ("--data", "--data.class_path") for argument in arguments):
        return True
    return any("class_path" in data for data in _data_of_files(arguments).values())


def _require_init_args(arguments: Sequence[str]) -> None:
    """Refuses options of a data module beside its class."""
    for file, data in _data_of_files(arguments).items():
        stray = next((name for name in data if name not in ("class_path", "init_args")), None)
        if stray is not None:
            raise ConfigurationError(
                f"The option 'data.{stray}' of {file!r} is beside the class of the data and not among its arguments; "
                "write it under data.init_args, after data.class_path."
            )


def _data_of_files(arguments: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """The options of the data in each configuration file that has any."""
    found: dict[str, Mapping[str, Any]] = {}
    for file in _config_files(arguments):
        content = read_yaml(file)
        data = content.get("data") if isinstance(content, Mapping) else None
        if isinstance(data, (str, Mapping)):
            found[file] = {"class_path": data} if isinstance(data, str) else data
    return found


def _with_switches(arguments: Sequence[str]) -> list[str]:
    """Lets ``--gate_importance false`` mean ``--gate_importance.enabled false``."""
    switches = tuple(f"--{name}" for name in CALLBACKS)
    expanded = []
    for argument, value in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, own_value = argument.partition("=")
        is_switch = option in switches and (own_value if equals else value) in _SWITCH_WORDS
        expanded.append(f"{option}.enabled{equals}{own_value}" if is_switch else argument)
    return expanded


def _expand_switches(config: Namespace, defaults: Namespace) -> None:
    """Turns ``gate_importance: false`` of a configuration file into the group with its switch off."""
    for name in CALLBACKS:
        value = config[name]
        if isinstance(value, Namespace):
            continue
        if value not in (None, True, False):
            raise ConfigurationError(explain(f'Parser key "{name}":', (), CALLBACKS, ()))
        config[name] = defaults[name].clone()
        config[name]["enabled"] = bool(value)


def _share_settings(config: Namespace, defaults: Namespace) -> None:
    """Gives both mechanisms, which find and observe gates together, what was set for one of them."""
    for setting in ("observer", "allow_unmasked_gates", "example_inputs"):
        for given, other in (_MECHANISMS, _MECHANISMS[::-1]):
            untouched = config[other][setting] == defaults[other][setting]
            if untouched and config[given][setting] != defaults[given][setting]:
                config[other][setting] = config[given][setting]


def _config_files(arguments: Sequence[str]) -> list[str]:
    files = []
    for position, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option in ("-c", "--config"):
            files += [value] if value else list(arguments[position + 1 : position + 2])
    return files


def _refuse_twice(listed: Iterable[Callback]) -> None:
    for name, kind in CALLBACKS.items():
        if any(isinstance(callback, kind) for callback in listed):
            raise ConfigurationError(
                f"{kind.__name__} is in trainer.callbacks and would act twice; set its options under {name!r} and "
                "leave it out there."
            )


def _write_predictions(path: Path, batches: Iterable[Any], answers: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for batch, texts in zip(batches, answers, strict=False):
            for prompt, text in zip(batch["prompts"], texts, strict=True):
                file.write(json.dumps({"prompt": prompt, "answer": text}, ensure_ascii=False) + "\n")
