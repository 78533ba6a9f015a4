"""Shows what the gates do: curves and pictures for the loggers of a trainer, and the history in the run's folder."""

from __future__ import annotations

import errno
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from numpy.typing import NDArray

from na_lora_lightning.callbacks.logger_kinds import folder_of_run, is_tensorboard, show_picture
from na_lora_lightning.callbacks.run_description import describe_run
from na_lora_lightning.callbacks.tensorboard_pages import TensorBoardPages
from na_lora_lightning.callbacks.view_options import ViewOptions
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.mechanisms.importance import TemporalImportance
from na_lora_lightning.core.mechanisms.metrics import sites_by_activation
from na_lora_lightning.curves import HEAT_MAPS, overview_tag
from na_lora_lightning.errors import ViewWarning
from na_lora_lightning.gate_history import describe_gates, worth_keeping
from na_lora_lightning.history import HistoryWriter, read_history
from na_lora_lightning.lightning_internals import metrics_of_loop
from na_lora_lightning.pictures import as_pixels, as_png, heat_map

# Of the mean slope; below it a channel's gate is shut, or its slope was never seen.
QUIET = 0.01
PICTURES = "pictures"
# Bytes that pictures leave free on the disk.
_ROOM = 1 << 24


class GateMonitor:
    """What is shown of one fit, by the process that writes.

    Args:
        trainer: Its fit begins.
        pl_module: What it trains.
        controller: All mechanisms are on.
        options: What is wanted.
    """

    def __init__(
        self, trainer: Trainer, pl_module: LightningModule, controller: GateController, options: ViewOptions
    ) -> None:
        self._controller = controller
        self._options = options
        self._folder = folder_of_run(trainer)
        self._history = None if self._folder is None or not options.history else HistoryWriter(self._folder)
        self._series: dict[int, dict[str, NDArray[np.float32]]] = {}
        self._peak: Any = None
        self._peak_since = 0
        self._started = False
        self._learning_rate: float | None = None
        self._pictured_at = 0
        self._given_up: set[str] = set()
        self._described = describe_run(trainer, pl_module, controller)
        self._pages: list[TensorBoardPages] = []
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._try("hyper-parameters in TensorBoard", lambda: self._open_pages(trainer, pl_module))

    @property
    def keeps_history(self) -> bool:
        """Whether there is a folder to write to, so that logging steps are measured without a logger too."""
        return self._history is not None

    @property
    def folder(self) -> Path | None:
        """Where the history is; None where none is kept."""
        return None if self._history is None else self._folder

    # ---- in the course of the fit ----

    def start(self, trainer: Trainer) -> None:
        """Begins the history, or goes on with it; once."""
        if self._started:
            return
        self._started = True
        step = self._peak_since = self._pictured_at = trainer.global_step
        if self._history is None:
            return
        self._try("the earlier history", lambda: self._recall(step))
        planned = self._controller.total_steps
        self._keep(
            "start",
            step,
            version=1,
            planned_steps=None if planned is None else int(planned - self._controller.steps + step),
            **self._described,
            **describe_gates(self._controller),
        )

    def before_step(self, trainer: Trainer) -> None:
        """Before a step that is going to be logged: takes its learning rate, which a schedule may change after it."""
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self._learning_rate = float(max(rates)) if rates else None

    def write_step(self, trainer: Trainer, step: int) -> None:
        """Writes curves at a logging step, and pictures where they are due.

        Args:
            trainer: In its fit, after the optimizer's step.
            step: Under which loggers show it.
        """
        found = self._controller.gate_metrics()
        curves = found.overview() | (found.by_layer() if self._options.layer_curves else {})
        for pages in self._pages:
            self._try("descriptions in TensorBoard", partial(pages.describe, curves))
        for logger in trainer.loggers:
            logger.log_metrics(curves, step=step)
        taken = trainer.global_step
        self._series[taken] = _as_arrays(found.sites)
        self._note_responses()
        if self._history is not None:
            self._keep("step", taken, gates=worth_keeping(found), metrics=self._metrics(trainer))
        every = self._options.picture_every_n_steps
        if every and taken - self._pictured_at >= every:
            self.draw(trainer, step)

    def write_validation(self, trainer: Trainer, samples: list[dict[str, Any]]) -> None:
        """Writes what validation measured; a sanity check counts where it is of the whole data, before training."""
        is_whole = not trainer.sanity_checking or trainer.num_sanity_val_steps == float("inf")
        if not is_whole or (trainer.sanity_checking and trainer.global_step > 0):
            return
        self.start(trainer)
        metrics = metrics_of_loop(trainer)
        if not metrics:
            return
        self._keep("validation", trainer.global_step, metrics=metrics, samples=samples)
        for pages in self._pages if samples else ():
            self._try("samples in TensorBoard", partial(pages.show_samples, samples, trainer.global_step))

    def end(self, trainer: Trainer, outcome: str) -> None:
        """Draws the last pictures and says in the history how the fit ended."""
        if not self._started:
            return
        self._started = False
        if self._series and self._pictured_at < max(self._series):
            self.draw(trainer, max(trainer.global_step - 1, 0))
        self._keep("end", trainer.global_step, outcome=outcome)

    def draw(self, trainer: Trainer, step: int) -> None:
        """Draws the heat maps for loggers that take pictures, and into the run's folder."""
        self._pictured_at = trainer.global_step
        if trainer.is_global_zero:
            self._try("heat maps", lambda: self._show_pictures(trainer, step))
        if quiet := self._quiet():
            self._keep("channels", trainer.global_step, **quiet)

    def heat_maps(self) -> Iterator[tuple[str, bytes]]:
        """The heat map of each group that was measured, as PNG files."""
        labels = self._controller.gates.labels
        for curve in HEAT_MAPS:
            measured = {step: groups[curve.group] for step, groups in self._series.items() if curve.group in groups}
            # A mask that only watches has no churn.
            if not measured or (curve.group == "gate_mask_churn" and not any(map(np.any, measured.values()))):
                continue
            steps = sorted(measured)
            values = np.stack([measured[step] for step in steps], axis=1)
            assert curve.colours is not None
            yield curve.group, as_png(heat_map(curve.title, labels, steps, values, curve.colours))

    def last_of(self, group: str) -> dict[str, float]:
        """The last value of each site that was measured, by its label."""
        steps = [step for step, groups in self._series.items() if group in groups]
        if not steps:
            return {}
        values = self._series[max(steps)][group].tolist()
        return {
            label: value for label, value in zip(self._controller.gates.labels, values, strict=True) if value == value
        }

    def quiet_channels(self) -> dict[str, int]:
        """How many channels of each layer have not responded so far; without those where all did."""
        counts = self._quiet().get("quiet", [])
        return {label: count for label, count in zip(self._controller.gates.labels, counts, strict=False) if count}

    # ---- writing, which is no reason to lose a training ----

    def _keep(self, kind: str, step: int, **content: Any) -> None:
        if self._history is not None:
            self._try("the history", partial(self._history.write, kind, step, **content))

    def _try(self, what: str, write: Callable[[], Any]) -> None:
        """Says once that something cannot be written, and leaves it from then on."""
        if what in self._given_up:
            return
        try:
            write()
        except Exception as error:
            self._given_up.add(what)
            warnings.warn(
                f"{what} cannot be written ({type(error).__name__}: {error}), and training goes on without.",
                ViewWarning,
                stacklevel=2,
            )

    def _open_pages(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tags = [*self._controller.gate_metrics().overview(), *_misalignment_tags(self._controller)]
        names = sorted(pl_module.metric_names()) if hasattr(pl_module, "metric_names") else []  # type: ignore[operator]
        for logger in filter(is_tensorboard, trainer.loggers):
            self._pages.append(TensorBoardPages(logger, self._described["options"], names, tags))

    def _recall(self, step: int) -> None:
        known = read_history(self._folder) if step and self._folder is not None else None
        for entry in known.steps if known is not None else ():
            if entry["step"] <= step and isinstance(entry.get("gates"), dict):
                self._series[entry["step"]] = _as_arrays(entry["gates"])

    def _show_pictures(self, trainer: Trainer, step: int) -> None:
        pictures = dict(self.heat_maps())
        # Before a logger has any: one whose file has no room for a picture takes no curve from then on either.
        if self._folder is not None:
            _write(self._folder / PICTURES, pictures)
        for group, png in pictures.items():
            for logger in trainer.loggers:
                show_picture(logger, overview_tag(group) + "_by_layer", png, as_pixels, step)

    # ---- what is measured ----

    def _note_responses(self) -> None:
        importance = self._controller.importance
        if importance is None or importance.options.criterion != "output_derivative":
            return
        seen = importance.responsiveness
        self._peak = seen.clone() if self._peak is None else self._peak.maximum(seen)

    def _quiet(self) -> dict[str, Any]:
        importance = self._controller.importance
        if self._peak is None or importance is None:
            return {}
        below = (self._peak < QUIET).cpu()
        counts = [int(below[columns].sum()) for columns in importance.layout.site_slices]
        return {"since": self._peak_since, "below": QUIET, "quiet": counts}

    def _metrics(self, trainer: Trainer) -> dict[str, float]:
        rate = {} if self._learning_rate is None else {"learning_rate": self._learning_rate}
        return metrics_of_loop(trainer) | rate


def write_histograms(trainer: Trainer, importance: TemporalImportance, labels: list[str], step: int) -> None:
    """Writes the responsiveness of each site's channels as a histogram to TensorBoard loggers."""
    for logger in trainer.loggers:
        if is_tensorboard(logger) and trainer.is_global_zero:
            experiment: Any = logger.experiment  # type: ignore[attr-defined]
            for label, columns in zip(labels, importance.layout.site_slices, strict=True):
                values = importance.responsiveness[columns].cpu()
                experiment.add_histogram(f"responsiveness_of_channels/{label}", values, step)


def _misalignment_tags(controller: GateController) -> list[str]:
    activations = list(sites_by_activation(controller.gates))
    suffixes = [f"/{name}" for name in activations] if len(activations) > 1 else [""]
    return [
        overview_tag(group) + suffix for group in ("selection_misalignment", "selection_share") for suffix in suffixes
    ]


def _as_arrays(groups: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    drawn = {curve.group for curve in HEAT_MAPS}
    return {group: np.array(values, dtype=np.float32) for group, values in groups.items() if group in drawn}


def _write(folder: Path, pictures: Mapping[str, bytes]) -> None:
    """Writes pictures, and none where that would leave too little room for curves and checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < _ROOM + 2 * sum(map(len, pictures.values())):
        raise OSError(errno.ENOSPC, f"{free:,} bytes are free, which are left to curves and checkpoints", str(folder))
    for group, content in pictures.items():
        partial = folder / f".{group}.png.partial"
        try:
            partial.write_bytes(content)
            partial.replace(folder / f"{group}.png")
        except OSError:
            partial.unlink(missing_ok=True)
            raise
