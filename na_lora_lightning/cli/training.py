"""The subcommands that run a trainer: fit, validate, test and predict."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor, OnExceptionCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.enums import LightningEnum
from typing_extensions import override

from na_lora_lightning.callbacks.gate_importance import GateImportanceCallback
from na_lora_lightning.callbacks.step_scale import StepScaleCallback
from na_lora_lightning.checkpoints.callbacks import ResumableCurves, RunCheckpoint, RunConfigCallback
from na_lora_lightning.checkpoints.files import AtomicCheckpointIO
from na_lora_lightning.checkpoints.last_run import (
    continue_last_run,
    last_checkpoint,
    output_folders,
    require_training_state,
    require_writable,
)
from na_lora_lightning.checkpoints.run_folder import RunFolder, free_path, run_folder
from na_lora_lightning.checkpoints.run_folders import is_dry_run
from na_lora_lightning.checkpoints.stopping import quiet_writers, stopped_from_outside
from na_lora_lightning.cli.arguments import (
    DESCRIPTIONS,
    PlainParser,
    config_files,
    expand_switches,
    names_class,
    parser_settings,
    require_init_args,
    require_known_variables,
    share_settings,
    with_switches,
)
from na_lora_lightning.cli.errors import errors_of_lightning, explain
from na_lora_lightning.cli.trainer_options import (
    replaced_groups,
    require_metrics,
    require_possible,
    require_usable_callbacks,
    with_end,
)
from na_lora_lightning.core.in_force import say
from na_lora_lightning.data import InstructionDataModule
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.lightning_internals import parsers_of_commands, require_cli
from na_lora_lightning.models.saved_adapter import adapter_folder, with_tokens_of_adapter
from na_lora_lightning.models.source import BaseModelSource, require_model
from na_lora_lightning.modules.fit_summary import FitSummaryCallback
from na_lora_lightning.modules.language import NALoRALightningModule
from na_lora_lightning.modules.training import AdapterTrainingModule

# Callbacks of every fit, each with its own group of options beside a switch.
CALLBACKS: dict[str, type[Callback]] = {
    "gate_importance": GateImportanceCallback,
    "step_scale": StepScaleCallback,
    "fit_summary": FitSummaryCallback,
    "checkpoint": RunCheckpoint,
}
_MECHANISMS = ("gate_importance", "step_scale")

# Defaults of Lightning's that YAML knows nothing of, such as the interval of its Timer.
yaml.SafeDumper.add_multi_representer(LightningEnum, lambda dumper, member: dumper.represent_str(str(member.value)))

TRAINER_DEFAULTS: dict[str, Any] = {
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    # Measures the base model on the whole validation data, for the summary's "before".
    "num_sanity_val_steps": -1,
}

_CHECKPOINT_WORDS = ("best", "last", "hpc", "registry")


class TrainingParser(PlainParser, LightningArgumentParser):
    """Lightning's parser with help that can be read in a terminal."""


class NALoRACLI(LightningCLI):
    """A ``LightningCLI`` for one subcommand, with the two mechanisms as option groups of their own.

    ``gate_importance``, ``step_scale``, ``fit_summary`` and ``checkpoint`` are callbacks of every fit, unless their
    ``enabled`` is false or one of them, or another checkpoint callback, is in ``trainer.callbacks``. With
    ``--ckpt_path last`` the last run goes on in its own folder. The data module is ``InstructionDataModule``, or the
    class that ``--data`` or ``data.class_path`` names; its tokenizer or processor is the model's. Options always come
    from the configuration, also with ``--ckpt_path``; a checkpoint of another model or LoRA is refused.

    Args:
        subcommand: ``fit``, ``validate``, ``test`` or ``predict``.
        arguments: The command line, beginning with ``subcommand``.
    """

    def __init__(self, subcommand: str, arguments: Sequence[str]) -> None:
        # Lightning sets it too late for what is overridden here.
        self.subcommand = self._requested = subcommand
        self._full_config: Namespace | None = None
        require_cli(LightningCLI)
        own = [group for group in ("model", "data") if names_class(arguments, group)]
        for group in own:
            require_init_args(arguments, group)
        super().__init__(
            AdapterTrainingModule if "model" in own else NALoRALightningModule,
            LightningDataModule if "data" in own else InstructionDataModule,
            subclass_mode_model="model" in own,
            subclass_mode_data="data" in own,
            save_config_callback=RunConfigCallback,
            save_config_kwargs={"overwrite": True},
            trainer_defaults=dict(TRAINER_DEFAULTS),
            seed_everything_default=0,
            parser_class=TrainingParser,
            parser_kwargs={
                "prog": "na-lora",
                **parser_settings(),
                subcommand: {
                    "description": DESCRIPTIONS[subcommand],
                    "usage": f"na-lora {subcommand} [--config FILE] [--OPTION VALUE ...]",
                    **parser_settings(),
                },
            },
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
            assert parser.groups is not None
            parser.groups[name].add_argument(
                f"--{name}.enabled", type=bool, default=True, help=f"Whether fit uses {kind.__name__}."
            )
        group, readers = "data", ["tokenizer"]
        if self.subclass_mode_data:
            # A class is not handed what it has no use for.
            group, readers = "data.init_args", ["tokenizer", "processor"]
        model = "model.init_args" if self.subclass_mode_model else "model"
        for reader in readers:
            parser.link_arguments(f"{model}.model_name_or_path", f"{group}.{reader}_name_or_path")
            parser.link_arguments(f"{model}.revision", f"{group}.{reader}_revision")
        for option in ("trust_remote_code", "new_tokens"):
            parser.link_arguments(f"{model}.{option}", f"{group}.{option}")

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, and says what is wrong in one sentence.

        Raises:
            ConfigurationError: The arguments or a configuration file are wrong.
        """
        parser_of_command = parsers_of_commands(self)[self._requested]
        keys = {action.dest for action in parser_of_command._actions if not action.dest.endswith(".help")}
        try:
            # Lightning's own method does this too, and warns of arguments that are not those of the process.
            require_known_variables(self._requested, keys)
            self.config = parser.parse_args(with_switches(args, CALLBACKS))
        except ArgumentError as error:
            raise ConfigurationError(explain(str(error), keys, CALLBACKS, config_files(args))) from error
        expand_switches(self.config[self._requested], parser_of_command.get_defaults(), CALLBACKS)
        share_settings(self.config[self._requested], parser_of_command.get_defaults(), _MECHANISMS)

    @override
    def _parse_ckpt_path(self) -> None:
        # Lightning would put the checkpoint's options over those that the user gives now.
        path = self._get(self.config, "ckpt_path")
        if path and path not in _CHECKPOINT_WORDS and "://" not in path and not Path(path).exists():
            raise ConfigurationError(f"the checkpoint {path!r} does not exist; correct ckpt_path.")
        if path == "best":
            raise ConfigurationError(
                "ckpt_path is 'best', which is known only while a fit runs; give the path of the checkpoint, or 'last'."
            )

    @override
    def _set_seed(self) -> None:
        self._draws_seed = self._get(self.config, "seed_everything") is True
        super()._set_seed()

    @override
    def before_instantiate_classes(self) -> None:
        """Fails on a model that cannot be had before data is prepared, and has data read as an adapter's was."""
        model, data = self._get(self.config, "model"), self._get(self.config, "data")
        model = model.init_args if self.subclass_mode_model else model
        data = data.get("init_args", {}) if self.subclass_mode_data else data
        tokens = model.get("new_tokens") or ()
        trust = bool(model.get("trust_remote_code"))
        source = BaseModelSource(model.model_name_or_path, model.revision, trust, new_tokens=tokens)
        require_model(source)
        if "new_tokens" in model and "new_tokens" in data and model.adapter.start is not None:
            source = with_tokens_of_adapter(source, adapter_folder(model.adapter.start))
            model.new_tokens = data.new_tokens = list(source.new_tokens)

    @override
    def instantiate_classes(self) -> None:
        """Makes module, data and trainer."""
        self._full_config = self.config
        self.config = self.config.clone()
        # The switches are of the command line, not of the callbacks.
        for name in CALLBACKS:
            del self.config[self._requested][name]["enabled"]
        with errors_of_lightning("what the configuration names cannot be made", ImportError):
            super().instantiate_classes()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Makes the trainer with the callbacks that are switched on."""
        assert self._full_config is not None
        self.config = self._full_config
        options = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        listed = options.get("callbacks") or []
        listed = listed if isinstance(listed, list) else [listed]
        defaults = parsers_of_commands(self)[self._requested].get_defaults()
        replaced = replaced_groups(listed, CALLBACKS, self._full_config[self._requested], defaults)
        if self._requested == "fit":
            options = with_end(options)
            require_usable_callbacks(listed)
        require_possible(options, fits=self._requested == "fit")
        self._run = RunFolder()
        added: list[Callback] = [self._run]
        if self._requested == "fit":
            switched_on = [name for name in CALLBACKS if self._get(self.config, name)["enabled"]]
            enabled = [name for name in switched_on if name not in replaced]
            if options.get("enable_checkpointing") is False or any(_saves_by_itself(c) for c in listed):
                enabled = [name for name in enabled if name != "checkpoint"]
            elif "checkpoint" not in {*enabled, *replaced}:
                options["enable_checkpointing"] = False
            added += [self._get(self.config_init, name) for name in enabled]
            if not {*enabled, *replaced} & set(_MECHANISMS):
                say("NA-LoRA: gate_importance and step_scale are switched off, so this is plain LoRA.")
            if options.get("logger") is not False and not any(isinstance(c, LearningRateMonitor) for c in listed):
                added.append(LearningRateMonitor(logging_interval="step"))
            self._curves = ResumableCurves()
            added.append(self._curves)
        options["plugins"] = _with_checkpoint_io(options.get("plugins"))
        with errors_of_lightning("the trainer cannot be made", ImportError, TypeError, ValueError):
            return self._instantiate_trainer(options, added)

    @override
    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Fails where nothing can be written, and finds the checkpoint that ``last`` means."""
        require_writable(output_folders(self.trainer))
        options: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        if options.get("ckpt_path") == "last":
            if subcommand == "fit":
                # Its own folder is not empty, of course.
                warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
                options["ckpt_path"] = continue_last_run(self.trainer)
                self._curves.starts_over = options["ckpt_path"] is None
            else:
                options["ckpt_path"] = last_checkpoint(self.trainer)
        if subcommand == "fit" and options.get("ckpt_path"):
            require_training_state(options["ckpt_path"])
        self._run.begin(self.trainer, options.get("ckpt_path"), trains=subcommand == "fit")
        return options

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        with errors_of_lightning(f"the trainer cannot {subcommand}"):
            super()._run_subcommand(subcommand)

    def fit(self, model: NALoRALightningModule, **options: Any) -> None:
        """Trains, and says how to resume if training is stopped from outside."""
        model.draws_seed = self._draws_seed
        require_metrics(self.trainer, model, self.datamodule)
        with stopped_from_outside(self.trainer), quiet_writers():
            self.trainer.fit(model, **options)

    def predict(self, model: NALoRALightningModule, **options: Any) -> None:
        """Predicts, and writes the answers beside their prompts."""
        answers = self.trainer.predict(model, **{**options, "return_predictions": True}) or []
        if is_dry_run(self.trainer):
            print("A dry run writes no predictions")
            return
        suffix = f"-{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
        path = free_path(run_folder(self.trainer) / f"predictions{suffix}.jsonl")
        loader = self.trainer.predict_dataloaders
        assert loader is not None
        _write_predictions(path, loader, answers)
        print(f"Predictions {path}")


def _with_checkpoint_io(plugins: Any) -> list[Any]:
    """Adds the plugin that writes checkpoints, unless another one is given."""
    given = list(plugins) if isinstance(plugins, (list, tuple)) else [] if plugins is None else [plugins]
    return given if any(isinstance(plugin, CheckpointIO) for plugin in given) else [*given, AtomicCheckpointIO()]


def _saves_by_itself(callback: Callback) -> bool:
    # The one for failures saves nothing to resume from after a kill.
    return isinstance(callback, Checkpoint) and not isinstance(callback, OnExceptionCheckpoint)


def _write_predictions(path: Path, batches: Iterable[Any], answers: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for batch, texts in zip(batches, answers, strict=False):
            for prompt, text in zip(batch["prompts"], texts, strict=True):
                file.write(json.dumps({"prompt": prompt, "answer": text}, ensure_ascii=False) + "\n")
