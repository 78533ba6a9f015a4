"""A cell: one training run of the study, all that decided its numbers, and its record.

An arm is a name, a dictionary of options, and a hook for what options cannot say. Every option of the method is the
package's own: ``importance`` goes to ``ImportanceOptions``, ``step_scale`` to ``StepScaleOptions``, and what is not
named is as in :data:`PLAIN_READING`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.study import StudyError
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions
from na_lora_lightning.core.observation.observer import ObserverOptions

RESULTS = Path(__file__).with_name("results") / "cells.jsonl.gz"

# What an arm means where it names no option: the plain reading of the method. The package's own defaults follow from
# the study, and must not change what its results are results of.
PLAIN_READING: dict[str, dict[str, Any]] = {
    "importance": {
        "keep_fraction": 0.5,
        "beta": 0.9,
        "criterion": "selection_derivative",
        "scope": "site",
        "warmup_steps": 10,
        "refresh_every": 10,
        "selection": "top_k",
    },
    "step_scale": {
        "granularity": "activation",
        "normalize": False,
        "tau": 0.1,
        "eta_min": 0.1,
        "beta": 0.9,
        "matrix_a_factor": 1.0,
    },
    "observer": {"max_tokens": 128},
}

# Options that the package had not yet when the first results were made. A cell that leaves them out is still the same.
ADDED_LATER = (("step_scale", "matrix_a_factor"),)


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune.

    Attributes:
        name: Name in the study.
        importance: Options of the temporal-importance mask; None leaves it out.
        step_scale: Options of the step scale; None leaves it out.
        observer: Options of the observer.
        method: ``"lora"`` or ``"adalora"``.
        peft: Further arguments of PEFT's configuration.
        without_gates: Leave the gate layers without LoRA.
        optimizer: ``"adamw"``, ``"lora_plus"`` or ``"lora_fa"``.
        optimizer_options: Its further arguments.
        training: What this arm trains differently (the learning rate's warm-up, say).
        rate_factor: Factor on the learning rates of a setting, where a method lives at other rates.
        hook: A name in :data:`~benchmarks.study.arms.hooks.HOOKS`, or ``module:Class``.
        hook_options: Its arguments.
    """

    name: str
    importance: Mapping[str, Any] | None = None
    step_scale: Mapping[str, Any] | None = None
    observer: Mapping[str, Any] = field(default_factory=dict)
    method: str = "lora"
    peft: Mapping[str, Any] = field(default_factory=dict)
    without_gates: bool = False
    optimizer: str = "adamw"
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    rate_factor: float = 1.0
    hook: str | None = None
    hook_options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_options(cls, name: str, options: Mapping[str, Any] | None) -> Arm:
        """Reads an arm of a YAML file; options are checked by the classes that take them.

        Raises:
            StudyError: An option is unknown.
        """
        known = {entry.name for entry in fields(cls)} - {"name"}
        unknown = sorted(set(options or {}) - known)
        if unknown:
            raise StudyError(f"the arm {name!r} has no option {unknown[0]!r}; it takes {', '.join(sorted(known))}.")
        arm = cls(name, **(options or {}))
        for kind, given in ((ImportanceOptions, arm.importance), (StepScaleOptions, arm.step_scale)):
            if given is not None:
                kind(**given)
        return arm

    def plain(self) -> dict[str, Any]:
        """Plain values from which :meth:`from_options` makes this arm again, the name left out."""
        values = asdict(self)
        del values["name"]
        return values

    @property
    def resolved(self) -> dict[str, Any]:
        """The options of the mechanisms, all of them."""
        kinds = (
            ("importance", ImportanceOptions, self.importance),
            ("step_scale", StepScaleOptions, self.step_scale),
            ("observer", ObserverOptions, self.observer),
        )
        return {
            name: None if given is None else asdict(kind(**(PLAIN_READING[name] | dict(given))))
            for name, kind, given in kinds
        }

    @property
    def decisive(self) -> dict[str, Any]:
        """:attr:`resolved` without what was added later and does nothing here: what a fingerprint is taken of."""
        found = self.resolved
        for name, option in ADDED_LATER:
            if found[name] is not None and found[name][option] == PLAIN_READING[name][option]:
                del found[name][option]
        return found

    def options_of(self, seed: int) -> dict[str, Any]:
        """:attr:`resolved` as a cell of this seed uses it: the random control draws other masks for every seed."""
        found = self.resolved
        if self.importance is not None and "seed" not in self.importance:
            found["importance"]["seed"] = seed
        return found


@dataclass(frozen=True)
class Setting:
    """A model, a task and LoRA targets: what the arms are compared on.

    Attributes:
        name: Such as ``llama-silu.functions.r4-all-linear``.
        model: Folder of the base model; cells were named after a cache, and its last part is the name.
        task: Name of the task.
        data: Its data, as :func:`benchmarks.study.tasks.sources.load` takes them.
        training: How every arm is trained.
        lora: ``rank``, ``alpha``, ``targets``.
    """

    name: str
    model: str
    task: str
    data: Mapping[str, Any]
    training: Mapping[str, Any]
    lora: Mapping[str, Any]


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
        """Name of its record."""
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
        )
        return cls(setting, Arm.from_options(config["arm_name"], config["arm"]), config["rate"], config["seed"])


def recorded(file: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The records of all cells by name, in the schema of PEFT's method comparison with ``study_info`` added."""
    records = map(json.loads, gzip.decompress(file.read_bytes()).decode().splitlines())
    return {record["run_info"]["experiment_name"]: record for record in records}
