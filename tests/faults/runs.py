"""``na-lora fit`` on a tiny model in a process of its own, and everything that a run leaves behind."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import yaml
from module_helpers import saved_model, write_records
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Imported here so that every forked run starts warm.
import na_lora_lightning.cli.training
from na_lora_lightning.checkpoints.files import newest_first
from na_lora_lightning.cli.main import main

torch.set_num_threads(1)

# Per second of the wall clock, so never the same twice: their steps are compared, and not their values.
_OF_THE_CLOCK = "_per_second"
_LONGEST_RUN = 120.0


@dataclass(frozen=True)
class Setting:
    """A way to train: enough of a run for kills to fall anywhere in it.

    Attributes:
        name: For reports.
        options: Arguments of the command line beside the common ones; ``{records}`` stands for the data.
        logger: One of ``LOGGERS``.
    """

    name: str
    options: tuple[str, ...]
    logger: str = "TensorBoard"


# With the folder of the run in the place of {run}.
LOGGERS: dict[str, tuple[str, ...]] = {
    "TensorBoard": (),
    "CSV": ("--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir={run}"),
    "none": ("--trainer.logger=false",),
}


SETTINGS = (
    Setting(
        "accumulation of 2, checkpoint every 2 steps, validation twice an epoch",
        ("--trainer.accumulate_grad_batches=2", "--checkpoint.every_n_steps=2", "--trainer.val_check_interval=0.5"),
    ),
    Setting(
        "a checkpoint every step, change of |φ'|, scale per activation",
        (
            "--checkpoint.every_n_steps=1",
            "--gate_importance.criterion=output_derivative_change",
            "--step_scale.granularity=activation",
            "--step_scale.normalize=false",
        ),
    ),
    Setting(
        "accumulation of 3, checkpoint every step, momentum, log every 2 steps",
        (
            "--trainer.accumulate_grad_batches=3",
            "--checkpoint.every_n_steps=1",
            "--model.optimizer=SGD",
            "--model.optimizer.lr=0.5",
            "--model.optimizer.momentum=0.9",
            "--trainer.log_every_n_steps=2",
        ),
    ),
    Setting(
        "streamed data of two sources by weight, records left out, checkpoint every step",
        (
            '--data.train=[{"path": "{records}", "weight": 2}, {"path": "{records}", "weight": 1}]',
            "--data.streaming=true",
            "--data.shuffle_buffer=5",
            "--data.group_by_length=false",
            "--data.max_length=7",
            "--data.too_long=leave_out",
            "--trainer.max_epochs=-1",
            "--trainer.max_steps=16",
            "--checkpoint.every_n_steps=1",
        ),
    ),
    Setting(
        "a mixture of two sources, a share kept for validation, checkpoint every 2 steps",
        (
            '--data.train=[{"path": "{records}", "weight": 2}, {"path": "{records}", "weight": 1}]',
            "--data.validation=null",
            "--data.validation_fraction=0.2",
            "--checkpoint.every_n_steps=2",
        ),
    ),
)


class Workplace:
    """A tiny model, records and a configuration; runs go to folders below.

    Args:
        folder: Where everything is put.
        records: Number of training records.
    """

    def __init__(self, folder: Path, records: int = 18) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        base = saved_model(folder / "base")
        data = write_records(folder / "records.jsonl", records)
        self.config = folder / "config.yaml"
        self.config.write_text(
            yaml.safe_dump(
                {
                    "seed_everything": 1,
                    "model": {
                        "model_name_or_path": base,
                        "lora": {"r": 2, "alpha": 4, "dropout": 0.2},
                        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                        "schedule": {"name": "cosine", "warmup_steps": 2},
                        "evaluation": {"generate": True, "max_new_tokens": 2, "sample_count": 2},
                    },
                    "data": {"train": data, "validation": data, "batch_size": 2, "validation_batch_size": 9},
                    "gate_importance": {"warmup_steps": 1, "refresh_every": 2, "histogram_every_n_steps": 3},
                    "trainer": {
                        "accelerator": "cpu",
                        "max_epochs": 2,
                        "enable_progress_bar": False,
                        "enable_model_summary": False,
                        "log_every_n_steps": 1,
                    },
                }
            )
        )

    def arguments(self, run: Path, setting: Setting, *more: str) -> list[str]:
        """The command line of a fit."""
        place = f"--trainer.default_root_dir={run}"
        logger = [option.format(run=run) for option in LOGGERS[setting.logger]]
        options = [option.replace("{records}", str(self.folder / "records.jsonl")) for option in setting.options]
        return ["fit", "--config", str(self.config), place, *logger, *options, *more]


def forked(action: Callable[[], int], log: Path, kill_after: float | None = None) -> tuple[int, float]:
    """Runs ``action`` in a child process, and kills it if asked to.

    Args:
        action: Returns the exit status; a trap in it may kill its own process.
        log: Where what it prints goes.
        kill_after: Seconds until ``SIGKILL``; None lets it run.

    Returns:
        Exit status, or the negative number of the signal that ended it; and the seconds that it took.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            # A test runner has put others in their place.
            sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
            status = action()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    deadline = began + (_LONGEST_RUN if kill_after is None else kill_after)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            break
        time.sleep(0.002)
    seconds = time.monotonic() - began
    return (-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)), seconds


def fit(
    arguments: list[str], log: Path, trap: Callable[[], None] | None = None, kill_after: float | None = None
) -> tuple[int, float]:
    """Runs ``na-lora`` in a child process.

    Args:
        arguments: The command line.
        log: Where what it prints goes.
        trap: Called in the child beforehand, to set a trap.
        kill_after: See :func:`forked`.

    Returns:
        See :func:`forked`.
    """

    def action() -> int:
        # As users have it, also where the tests make warnings errors.
        warnings.simplefilter("default")
        warnings.showwarning = lambda message, category, *place: print(f"{category.__name__}: {message}")
        if trap is not None:
            trap()
        return main(arguments)

    return forked(action, log, kill_after)


@dataclass
class Remains:
    """What a finished run left.

    Attributes:
        adapter: Weights of the adapter folder by name.
        checkpoint: The newest checkpoint, without the trainer's bookkeeping.
        curves: Values by tag and step; a point that was logged twice with two values has both.
        shown: Steps by tag in the order in which TensorBoard shows them, or a CSV file has them; a point may be there
            twice in a row, as it is logged again after a kill that came between its checkpoint and it.
    """

    adapter: dict[str, Any]
    checkpoint: dict[str, Any]
    curves: dict[tuple[str, int], set[Any]] = field(default_factory=dict)
    shown: dict[str, list[int]] = field(default_factory=dict)


def last_run(run: Path) -> Path:
    """The folder of the only run below ``run``."""
    (folder,) = {path.parent for path in run.rglob("checkpoints") if path.is_dir()}
    return folder


def remains(run: Path) -> Remains:
    """Reads what a finished run left below its root folder."""
    folder = last_run(run)
    newest = newest_first((folder / "checkpoints").glob("*.ckpt"))[0]
    checkpoint = torch.load(newest, weights_only=True)
    callbacks = {
        name: state for name, state in checkpoint["callbacks"].items() if not name.startswith(("RunCheckpoint", "Fit"))
    }
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "na_lora_lightning_random_state", "global_step")
    found = Remains(
        adapter=load_file(folder / "adapter" / "adapter_model.safetensors"),
        checkpoint={**{name: checkpoint[name] for name in kept}, "callbacks": callbacks},
    )
    summary = next(state for name, state in checkpoint["callbacks"].items() if name.startswith("FitSummary"))
    found.checkpoint["summary"] = json.dumps(summary, sort_keys=True)
    for file in sorted(folder.glob("events.out.tfevents.*")):
        _read_curves(file, found.curves)
    if (folder / "metrics.csv").is_file():
        _read_rows(folder / "metrics.csv", found)
    every = {"scalars": 0, "histograms": 0}
    shown = EventAccumulator(str(folder), size_guidance=every).Reload()
    for tag in shown.Tags()["scalars"]:
        found.shown[tag] = [step for step, _ in groupby(event.step for event in shown.Scalars(tag))]
    return found


def _read_rows(file: Path, found: Remains) -> None:
    with file.open(newline="") as content:
        for row in csv.DictReader(content):
            for tag, value in row.items():
                if tag != "step" and value:
                    point = (tag, int(float(row["step"])))
                    found.curves.setdefault(point, set()).add(None if tag.endswith(_OF_THE_CLOCK) else value)
                    found.shown.setdefault(tag, []).append(point[1])
    found.shown = {tag: [step for step, _ in groupby(steps)] for tag, steps in found.shown.items()}


def _read_curves(file: Path, curves: dict[tuple[str, int], set[Any]]) -> None:
    events = EventAccumulator(str(file), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            value = None if tag.endswith(_OF_THE_CLOCK) else event.value
            curves.setdefault((tag, event.step), set()).add(value)
    for tag in events.Tags()["histograms"]:
        for event in events.Histograms(tag):
            curves.setdefault((tag, event.step), set()).add(repr(event.histogram_value))


def differences(whole: Remains, resumed: Remains) -> list[str]:
    """What of an interrupted run is not bitwise that of the uninterrupted one; empty if all is."""
    found = [f"adapter {name}" for name in _unequal(whole.adapter, resumed.adapter)]
    found += [f"checkpoint {name}" for name in _unequal(whole.checkpoint, resumed.checkpoint)]
    found += [f"lost point {tag} at {step}" for tag, step in sorted(whole.curves.keys() - resumed.curves.keys())]
    found += [f"stray point {tag} at {step}" for tag, step in sorted(resumed.curves.keys() - whole.curves.keys())]
    for point in sorted(whole.curves.keys() & resumed.curves.keys()):
        if whole.curves[point] != resumed.curves[point]:
            found.append(f"point {point[0]} at {point[1]}: {whole.curves[point]} and {resumed.curves[point]}")
    # These are logged at the start of every fit.
    once = {tag for tag in whole.shown if not tag.startswith(("model/", "hp_metric"))}
    found += [f"order of {tag}" for tag in sorted(once) if whole.shown[tag] != resumed.shown.get(tag)]
    return found


def _unequal(first: Any, second: Any, name: str = "") -> list[str]:
    """Names of the leaves in which two nested values differ."""
    if type(first) is not type(second):
        return [name]
    if isinstance(first, dict):
        keys = sorted(first.keys() | second.keys(), key=str)
        return [
            leaf
            for key in keys
            for leaf in (
                _unequal(first[key], second[key], f"{name}.{key}")
                if key in first and key in second
                else [f"{name}.{key}"]
            )
        ]
    if isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return [name]
        return [
            leaf
            for index, pair in enumerate(zip(first, second, strict=True))
            for leaf in _unequal(*pair, f"{name}.{index}")
        ]
    if isinstance(first, torch.Tensor):
        same = first.dtype == second.dtype and torch.equal(first, second)
        return [] if same else [name]
    return [] if first == second else [name]


__all__ = [
    "LOGGERS",
    "SETTINGS",
    "Remains",
    "Setting",
    "Workplace",
    "differences",
    "fit",
    "forked",
    "last_run",
    "na_lora_lightning",
    "remains",
]
