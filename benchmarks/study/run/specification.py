"""Studies in YAML, and the cells that they consist of.

A study file names settings (model, task, rank, targets, learning rates), arms and seeds; tasks and arms are defined
once, in ``tasks.yaml`` and ``arms.yaml`` beside it. A cell's configuration holds everything that decides its numbers,
so that studies share cells and a result file is enough to run its cell again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study import StudyError
from benchmarks.study.arms.arm import Arm

TRAINING_DEFAULTS: dict[str, Any] = {
    "steps": 200,
    "batch_size": 8,
    "evaluate_every": 50,
    "evaluation_batch_size": 32,
    "max_length": 128,
    "schedule": "cosine",
    "warmup_fraction": 0.05,
    "weight_decay": 0.0,
    "clip": 1.0,
    "device": "cpu",
    "dtype": "float32",
}
ROLES = ("screening", "confirmation")
_SETTING_KEYS = {"model", "task", "rank", "alpha", "targets", "rates", "training"}


@dataclass(frozen=True)
class Setting:
    """A model, a task and LoRA targets: what the arms are compared on.

    Attributes:
        name: Such as ``llama-silu.functions.r4-all-linear``; names the folder of its results.
        model: Folder of the base model.
        task: Name of the task.
        data: Its data, as :func:`benchmarks.study.tasks.pools.load` takes them.
        training: How every arm is trained.
        lora: ``rank``, ``alpha``, ``targets``.
        rates: Learning rates that each arm is trained with, ascending.
    """

    name: str
    model: str
    task: str
    data: Mapping[str, Any]
    training: Mapping[str, Any]
    lora: Mapping[str, Any]
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Cell:
    """One training run."""

    setting: Setting
    arm: Arm
    rate: float
    seed: int

    @property
    def training(self) -> dict[str, Any]:
        """The setting's training with the arm's differences."""
        return {**self.setting.training, **self.arm.training}

    @property
    def name(self) -> str:
        """Path of its result below the results folder, without suffix."""
        return f"{self.setting.name}/{self.arm.name}/rate{self.rate:.4g}-seed{self.seed}"

    def config(self) -> dict[str, Any]:
        """Everything that decides the numbers of this cell, in plain values."""
        setting = self.setting
        return {
            "setting": setting.name,
            "model_id": setting.model,
            "task": setting.task,
            "data": dict(setting.data),
            "training": self.training,
            "lora": dict(setting.lora),
            "arm_name": self.arm.name,
            "arm": self.arm.plain(),
            "rate": self.rate,
            "seed": self.seed,
        }

    @property
    def fingerprint(self) -> str:
        """Digest of :meth:`config`, and of the options that the package's defaults fill in."""
        text = json.dumps([self.config(), self.arm.decisive], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Cell:
        """The cell that :meth:`config` was taken from."""
        setting = Setting(
            config["setting"],
            config["model_id"],
            config["task"],
            config["data"],
            config["training"],
            config["lora"],
            (config["rate"],),
        )
        return cls(setting, Arm.from_options(config["arm_name"], config["arm"]), config["rate"], config["seed"])


@dataclass(frozen=True)
class Study:
    """All cells of a study file.

    Attributes:
        name: Its name.
        role: ``"screening"`` or ``"confirmation"``; a study may use tasks of its own role alone.
        baseline: Arm that the others are compared with.
        rate_step: Factor between neighbouring learning rates, where a grid is extended.
        settings: What the arms are compared on.
        arms: The arms.
        seeds: The seeds.
    """

    name: str
    role: str
    baseline: str
    rate_step: float
    settings: tuple[Setting, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]

    def cells(self) -> Iterator[Cell]:
        """All cells, seed by seed, so that a study that is stopped has compared every arm on the first seeds."""
        for seed in self.seeds:
            for setting in self.settings:
                for arm in self.arms:
                    for rate in setting.rates:
                        yield Cell(setting, arm, _rounded(rate * arm.rate_factor), seed)


def results_of(study: Study, results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of a study's settings, arms and seeds, those of rates beyond its grid too."""
    wanted = {(setting.name, arm.name) for setting in study.settings for arm in study.arms}
    return [
        result
        for result in results
        if ((config := result["run_info"]["train_config"])["setting"], config["arm_name"]) in wanted
        and config["seed"] in study.seeds
    ]


def _rounded(rate: float) -> float:
    return float(f"{rate:.4g}")


def neighbour(rate: float, factor: float) -> float:
    """The next learning rate of a grid, rounded as those of a study are."""
    return _rounded(rate * factor)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise StudyError(f"{str(path)!r} is not a file; give the path of a study in YAML.")
    return dict(yaml.safe_load(path.read_text()))


def load_study(path: str | Path) -> Study:
    """Reads a study.

    Raises:
        StudyError: A file, task, arm or option does not exist, or a task belongs to the other role.
    """
    path = Path(path)
    given = _read(path)
    tasks = _read(path.parent / "tasks.yaml")
    arms = _read(path.parent / "arms.yaml")
    role = given["role"]
    if role not in ROLES:
        raise StudyError(f"the role of {path.name} is {role!r}; choose one of {', '.join(ROLES)}.")
    missing = [name for name in given["arms"] if name not in arms]
    if missing:
        raise StudyError(f"the arm {missing[0]!r} of {path.name} is not defined; add it to the file of arms.")
    settings = tuple(_setting(entry, given, tasks, role, path.name) for entry in given["settings"])
    names = [setting.name for setting in settings]
    if len(set(names)) < len(names):
        raise StudyError(f"{path.name} has two settings of one name; each model, task, rank and targets once.")
    return Study(
        name=path.stem,
        role=role,
        baseline=given.get("baseline", "lora"),
        rate_step=float(given.get("rate_step", 2.0)),
        settings=settings,
        arms=tuple(Arm.from_options(name, arms[name]) for name in given["arms"]),
        seeds=tuple(given["seeds"]),
    )


def _setting(
    entry: Mapping[str, Any], given: Mapping[str, Any], tasks: Mapping[str, Any], role: str, file: str
) -> Setting:
    unknown = sorted(set(entry) - _SETTING_KEYS)
    if unknown:
        raise StudyError(f"a setting of {file} has the unknown key {unknown[0]!r}; it takes {sorted(_SETTING_KEYS)}.")
    if entry["task"] not in tasks:
        raise StudyError(f"the task {entry['task']!r} of {file} is not defined; add it to the file of tasks.")
    task = tasks[entry["task"]]
    if task["role"] != role:
        raise StudyError(
            f"{file} is for {role} and the task {entry['task']!r} is kept for {task['role']}; choose another task."
        )
    if entry["model"] not in given["models"]:
        raise StudyError(f"the model {entry['model']!r} of {file} has no folder; add it to models.")
    levels = (TRAINING_DEFAULTS, task.get("training", {}), given.get("training", {}), entry.get("training", {}))
    training = {key: value for level in levels for key, value in level.items()}
    unknown = sorted(set(training) - set(TRAINING_DEFAULTS))
    if unknown:
        raise StudyError(f"{file} trains with the unknown option {unknown[0]!r}; it takes {sorted(TRAINING_DEFAULTS)}.")
    lora = {
        "rank": entry["rank"],
        "alpha": entry.get("alpha", 2 * entry["rank"]),
        "targets": entry.get("targets", "all-linear"),
    }
    rates = tuple(sorted(_rounded(float(rate)) for rate in entry.get("rates", given.get("rates", ()))))
    if not rates:
        raise StudyError(f"a setting of {file} has no learning rates; give rates.")
    name = f"{entry['model']}.{entry['task']}.r{lora['rank']}-{lora['targets']}"
    return Setting(name, given["models"][entry["model"]], entry["task"], task["data"], training, lora, rates)
