"""What is compared: tasks, arms, learning rates and seeds, and the configuration of each fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.models.source import BaseModelSource, load_config

Options = dict[str, Any]

_PLAIN: Options = {"gate_importance": False, "step_scale": False}
_CONTROLS = "na_lora_lightning.compare.controls"

# What each is called on the command line, and how it differs from the configuration of the comparison.
ARMS: dict[str, Options] = {
    "lora": _PLAIN,
    "na_lora": {},
    "plain_reading": {
        "gate_importance.keep_fraction": 0.5,
        "gate_importance.criterion": "selection_derivative",
        "step_scale.granularity": "activation",
        "step_scale.normalize": False,
    },
    "mask": {"step_scale": False},
    "channel_scale": {"step_scale.granularity": "channel", "step_scale.normalize": True},
    "step_scale": {"gate_importance": False},
    "random_mask": {"gate_importance.variant.control": "random"},
    "reversed_mask": {"gate_importance.variant.control": "reversed"},
    "short_step": {**_PLAIN, "trainer.callbacks": [{"class_path": f"{_CONTROLS}.ShortGateSteps"}]},
    "no_gates": {
        **_PLAIN,
        "trainer.callbacks": [{"class_path": f"{_CONTROLS}.ShortGateSteps", "init_args": {"factor": 0.0}}],
    },
    "dora": {**_PLAIN, "model.lora.use_dora": True},
    "rslora": {**_PLAIN, "model.lora.use_rslora": True},
    "pissa": {**_PLAIN, "model.lora.init_lora_weights": "pissa"},
    "lora_plus": {
        **_PLAIN,
        "model.optimizer": {
            "class_path": f"{_CONTROLS}.lora_plus",
            "init_args": {"lr": 2e-4, "ratio": 16.0},
        },
    },
}
_SINGLE_TASK = "task"
_RATE = "model.optimizer.init_args.lr"
_OPTIMIZER: Options = {"class_path": "torch.optim.AdamW", "init_args": {"weight_decay": 0.0}}
# A cell leaves nothing but its numbers, and validates once, at its end.
_QUIET: Options = {
    "fit_summary": False,
    "checkpoint": False,
    "model.adapter.write": "never",
    "model.evaluation.generate": False,
    "trainer.logger": False,
    "trainer.enable_checkpointing": False,
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
    "trainer.num_sanity_val_steps": 0,
    "trainer.limit_val_batches": 0,
    "trainer.devices": 1,
}
# Where a cell runs is not what it is.
_PLACES = ("accelerator", "devices", "default_root_dir", "logger", "callbacks")


@dataclass(frozen=True, order=True)
class Cell:
    """One fit.

    Attributes:
        task: Name of the task.
        arm: Name of the arm.
        rate: Learning rate.
        seed: Of the initial A, the order of the data, dropout, and the random control.
    """

    task: str
    arm: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Plan:
    """All that defines a comparison, in plain values.

    Attributes:
        base: Configuration of ``na-lora fit`` that all cells share.
        tasks: Name of each task, and what it changes in ``base``.
        arms: Name of each arm, and what it changes; the first is what the others are compared with.
        rates: Learning rates that every arm is trained at, ascending.
        seeds: Number of seeds.
        extend: Rates that are added at most on either side of ``rates``, where an arm's best one is at the edge.
        prune: Per cent of validation loss above its arm's best at the first seed from which a rate is left out at the
            other seeds; None leaves out none.
        other_text: File with the text on which forgetting is measured; None stands for one that ships.
        last_layers: Train the last so many blocks alone, on inputs that are computed once; None trains what the
            configuration says.
    """

    base: Options
    tasks: dict[str, Options]
    arms: dict[str, Options]
    rates: tuple[float, ...]
    seeds: int = 3
    extend: int = 2
    prune: float | None = None
    other_text: str | None = None
    last_layers: int | None = None

    def __post_init__(self) -> None:
        if len(self.arms) < 2:
            raise ConfigurationError("a comparison needs two arms; name another one in --arms.")
        if not self.rates or min(self.rates) <= 0 or list(self.rates) != sorted(set(self.rates)):
            raise ConfigurationError("--rates needs positive learning rates that differ, as in 2e-4,5e-4,1e-3.")
        if self.seeds < 1:
            raise ConfigurationError(f"--seeds is {self.seeds}, and a comparison needs one at least.")

    @property
    def baseline(self) -> str:
        """The arm that the others are compared with."""
        return next(iter(self.arms))

    def cells(self) -> list[Cell]:
        """Those of the grid, in the order in which they are trained: one seed of everything first."""
        return [
            Cell(task, arm, rate, seed)
            for seed in range(self.seeds)
            for task in self.tasks
            for rate in self.rates
            for arm in self.arms
        ]

    def config(self, cell: Cell) -> Options:
        """The configuration of ``na-lora fit`` for a cell."""
        config = merged(self.base, self.tasks[cell.task], self.arms[cell.arm], _QUIET)
        optimizer = config.setdefault("model", {}).get("optimizer")
        if not isinstance(optimizer, Mapping):
            config["model"]["optimizer"] = merged(_OPTIMIZER, {"class_path": optimizer} if optimizer else {})
        changes: Options = {_RATE: cell.rate, "seed_everything": cell.seed}
        data = config.get("data") or {}
        changes["data.init_args.seed" if "class_path" in data else "data.seed"] = cell.seed
        if config.get("gate_importance") is not False:
            changes["gate_importance.variant.seed"] = cell.seed
        if self.last_layers is not None:
            lora = config["model"].get("lora") or {}
            if config["model"].get("new_tokens") or lora.get("trainable_token_indices"):
                raise ConfigurationError(
                    "--last-layers keeps what the last blocks are given, which changes where embeddings of tokens are "
                    "trained; leave it out, or model.new_tokens and model.lora.trainable_token_indices."
                )
            layers = load_config(BaseModelSource(config["model"]["model_name_or_path"])).get_text_config()
            last = range(layers.num_hidden_layers)[-self.last_layers :]
            changes["model.lora.layers_to_transform"] = list(last)
            for mechanism in ("gate_importance", "step_scale"):
                if config.get(mechanism) is not False:
                    changes[f"{mechanism}.allow_unmasked_gates"] = True
        return merged(config, changes)

    def described(self) -> dict[str, Any]:
        """Plain values from which :meth:`restored` makes the plan again."""
        return {**asdict(self), "rates": list(self.rates)}

    @classmethod
    def restored(cls, values: Mapping[str, Any]) -> Plan:
        """The plan that :meth:`described` described."""
        return cls(**{**values, "rates": tuple(values["rates"])})

    def identity(self) -> dict[str, str]:
        """A digest of each part that another worker must share, by what the user calls it."""
        base = merged(self.base, {})
        trainer = {name: value for name, value in (base.get("trainer") or {}).items() if name not in _PLACES}
        parts: dict[str, Any] = {"the configuration": {**base, "trainer": trainer}}
        parts |= {f"the task {name!r}": options for name, options in self.tasks.items()}
        parts |= {f"the arm {name!r}": options for name, options in self.arms.items()}
        parts["--last-layers"] = self.last_layers
        parts |= {f"the file {file!r}": _bytes_of(file) for file in self._files()}
        return {name: hashlib.sha256(_canonical(part)).hexdigest()[:16] for name, part in parts.items()}

    def _files(self) -> list[str]:
        named: list[Any] = [self.other_text]
        for task in self.tasks.values():
            data: Options = merged(self.base, task).get("data") or {}
            data = data.get("init_args", data)
            named += [data.get(split) for split in ("train", "validation", "test")]
        files = (str(name).partition(":")[0] for name in named if name)
        return sorted({file for file in files if Path(file).is_file()})


def _canonical(part: Any) -> bytes:
    return part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode()


def _bytes_of(file: str) -> bytes:
    return Path(file).read_bytes()


def nested(options: Mapping[str, Any]) -> Options:
    """Turns ``{"model.lora.r": 4}`` into ``{"model": {"lora": {"r": 4}}}``; both may be mixed."""
    found: Options = {}
    for name, value in options.items():
        value = nested(value) if isinstance(value, Mapping) else value
        for part in reversed(str(name).split(".")):
            value = {part: value}
        found = _over(found, value)
    return found


def merged(*layers: Mapping[str, Any]) -> Options:
    """Configurations over one another, the later ones on top.

    Another ``class_path`` takes the place of the former class with all of its arguments, and options of a group that
    was switched off switch it on again.
    """
    found: Options = {}
    for layer in layers:
        found = _over(found, nested(layer))
    return found


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> Options:
    if above.get("class_path", below.get("class_path")) != below.get("class_path"):
        return dict(above)
    found = dict(below)
    for name, value in above.items():
        former = found.get(name)
        found[name] = _over(former, value) if isinstance(former, Mapping) and isinstance(value, Mapping) else value
    return found


def read_configs(files: Sequence[str], changes: Sequence[str] = ()) -> Options:
    """The configuration files of ``na-lora fit`` over one another, then ``--OPTION VALUE`` pairs.

    Raises:
        ConfigurationError: A file cannot be read, or an option lacks its value.
    """
    layers = [_read(file) for file in files]
    layers = [layer["fit"] if set(layer) == {"fit"} else layer for layer in layers]
    waiting = list(changes)
    while waiting:
        option, equals, value = waiting.pop(0).partition("=")
        if not option.startswith("--") or not (equals or waiting):
            raise ConfigurationError(f"{option!r} is no option with a value; see na-lora compare --help.")
        layers.append({option[2:]: yaml.safe_load(value if equals else waiting.pop(0))})
    return merged(*layers)


def read_named(given: str, known: Mapping[str, Options], option: str) -> dict[str, Options]:
    """What ``--arms`` or ``--tasks`` names.

    Args:
        given: Names and files, separated by commas: a name that is known, ``FILE.yaml`` for all that a file holds, or
            ``FILE.yaml:name`` for one of them.
        known: Those that have a name already.
        option: Name of the option.

    Raises:
        ConfigurationError: There is no such name or file.
    """
    found: dict[str, Options] = {}
    for item in filter(None, (item.strip() for item in given.split(","))):
        file, _, name = item.partition(":")
        if not file.endswith((".yaml", ".yml")):
            if item not in known:
                names = f"one of {', '.join(known)}, or " if known else ""
                raise ConfigurationError(f"{option} names {item!r}, which is not known; use {names}a YAML file.")
            found[item] = dict(known[item])
            continue
        content = _read(file)
        if name and name not in content:
            raise ConfigurationError(f"{file!r} has no {name!r}, which {option} names; it has {', '.join(content)}.")
        for each, options in content.items():
            if not name or each == name:
                if not isinstance(options or {}, Mapping):
                    raise ConfigurationError(f"{each!r} in {file!r} has no options; write 'option: value' below it.")
                found[str(each)] = dict(options or {})
    if not found:
        raise ConfigurationError(f"{option} names nothing; see na-lora compare --help.")
    return found


def single_task() -> dict[str, Options]:
    """The tasks where the configuration is the only one."""
    return {_SINGLE_TASK: {}}


def _read(file: str) -> Options:
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or "it is not YAML"
        raise ConfigurationError(f"the file {file!r} cannot be read ({reason}); correct it.") from error
    if not isinstance(content, Mapping):
        raise ConfigurationError(f"the file {file!r} holds no options; write 'name: value' in its lines.")
    return dict(content)
