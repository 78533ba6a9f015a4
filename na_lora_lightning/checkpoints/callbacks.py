"""What makes a run resumable: when checkpoints are saved, what they hold of the curves, and the saved configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor
from typing_extensions import override

from na_lora_lightning.checkpoints.run_folder import free_path, run_folder
from na_lora_lightning.checkpoints.run_folders import ContinuedWriter, is_dry_run, same_path
from na_lora_lightning.checkpoints.stopping import RequeueRequest
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.lightning_internals import (
    forget_batches_of_finished_epoch,
    is_accumulating,
    is_last_batch,
    set_received_sigterm,
    unlogged_metrics,
    validation_follows,
)

_CURVES_KEY = "na_lora_lightning_curves"


class RunCheckpoint(ModelCheckpoint):
    """Saves a checkpoint every so many optimizer steps and after each epoch, and keeps the newest ones.

    A run that resumes from any of them comes to the same weights and curves as one that was never interrupted. For
    that, a checkpoint that is due where validation follows is saved after the validation, whose curves would
    otherwise be missing; and none is saved between the micro-batches of a step. On SIGTERM a single process
    finishes and saves the step under way, unless validation follows it, before the trainer stops. On the signal by
    which SLURM asks for an end (``#SBATCH --signal``), processes do so together, and the job is queued again.

    Args:
        every_n_steps: Optimizer steps from one checkpoint to the next; 0 saves after epochs alone.
        keep: How many checkpoints are kept, at least 1; with 2, one is left if the newest is damaged.
        dirpath: Folder; None stands for ``checkpoints`` in the run's log folder.

    Raises:
        ConfigurationError: A number is out of range.
    """

    def __init__(self, every_n_steps: int = 100, keep: int = 2, dirpath: str | None = None) -> None:
        if every_n_steps < 0:
            raise ConfigurationError(
                f"every_n_steps is {every_n_steps}, and it counts optimizer steps; give 0 (after epochs alone) or more."
            )
        if keep < 1:
            raise ConfigurationError(f"keep is {keep}, so no checkpoint would be left; give at least 1.")
        super().__init__(
            dirpath,
            monitor="step",
            mode="max",
            save_top_k=keep,
            every_n_train_steps=every_n_steps,
            # A step that is taken again after an interruption rewrites its checkpoint.
            enable_version_counter=False,
        )
        self.every_n_steps, self.keep = every_n_steps, keep
        self._due = False
        self._stops_after_step = self._requeues = False
        self._superseded: list[str] = []
        self._request = RequeueRequest()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes the folder, by which a run that was interrupted before its first checkpoint is told from none."""
        super().setup(trainer, pl_module, stage)
        writes = stage == "fit" and trainer.is_global_zero and not is_dry_run(trainer)
        if writes and "://" not in str(self.dirpath):
            Path(str(self.dirpath)).mkdir(parents=True, exist_ok=True)

    @override
    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens for a request to queue the job again."""
        self._request.listen(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens for it, and removes what a kill kept the run from removing."""
        super().on_train_start(trainer, pl_module)
        self._request.listen(trainer)
        superseded, self._superseded = self._superseded, []
        for path in superseded:
            if self._should_remove_checkpoint(trainer, path, ""):
                trainer.strategy.remove_checkpoint(path)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves if it is time to and the step is complete, unless something that belongs to it is still to come."""
        if is_accumulating(trainer):
            if self._is_told_to_stop(trainer):
                # The step is finished first, as half of one cannot be saved.
                self._stops_after_step = True
                set_received_sigterm(trainer, False)
            return
        if self._stops_after_step:
            self._stops_after_step = False
            set_received_sigterm(trainer, True)
        every = self._every_n_train_steps
        self._requeues = self._request.is_made(trainer)
        self._due = self._due or self._requeues or self._is_told_to_stop(trainer)
        self._due = self._due or (every > 0 and trainer.global_step % every == 0)
        if not is_last_batch(trainer) and not validation_follows(trainer):
            self._save_if_due(trainer)

    @staticmethod
    def _is_told_to_stop(trainer: Trainer) -> bool:
        # Each of several processes may be told at another step, and all have to save together.
        return trainer.world_size == 1 and trainer.received_sigterm

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves what was due before validation within an epoch."""
        if not trainer.sanity_checking and not is_last_batch(trainer):
            self._save_if_due(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves."""
        self._due = True
        self._save_if_due(trainer)

    def _save_if_due(self, trainer: Trainer) -> None:
        if self._due and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        self._due = False
        if self._requeues:
            self._requeues = False
            self._request.requeue(trainer)

    @override
    def _update_best_and_save(self, current: Tensor, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        # Removed only after the new one is saved, and so known to it, should the run be killed in between.
        full = len(self.best_k_models) == self.save_top_k
        self._superseded = [self.kth_best_model_path] if full else []
        super()._update_best_and_save(current, trainer, monitor_candidates)
        self._superseded = []

    @override
    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        # Lightning keeps the one that a fit began from, and so one more after each interruption.
        return previous != current and Path(str(self.dirpath)).absolute() in Path(previous).absolute().parents

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Has the epoch after a finished one begin with no batch counted."""
        if trainer.state.fn == "fit" and not trainer.enable_validation:
            forget_batches_of_finished_epoch(checkpoint)

    @override
    def state_dict(self) -> dict[str, Any]:
        """State of the checkpoints, as plain values and tensors."""
        return {**super().state_dict(), "superseded": list(self._superseded)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state of the checkpoints."""
        if self.dirpath is not None and same_path(self.dirpath, state_dict["dirpath"]):
            # However the folder was spelled then.
            state_dict = _moved(state_dict, str(self.dirpath))
            self._superseded = list(state_dict["superseded"])
        super().load_state_dict(state_dict)


def _moved(state: dict[str, Any], folder: str) -> dict[str, Any]:
    def move(path: str) -> str:
        return os.path.join(folder, os.path.basename(path)) if path else path

    paths = ("best_model_path", "kth_best_model_path", "last_model_path")
    return {
        **state,
        **{name: move(state[name]) for name in paths},
        "dirpath": folder,
        "best_k_models": {move(path): score for path, score in state["best_k_models"].items()},
        "superseded": [move(path) for path in state["superseded"]],
    }


class ResumableCurves(Callback):
    """Lets the curves of a resumed run be those of an uninterrupted one.

    Before a checkpoint is written, whatever was logged is flushed, and what Lightning logs only after the checkpoint
    of the same step is put into it. A resumed run logs that first. To TensorBoard it also says from which step on the
    interrupted run's points do not count, and from CSV files that the run goes on with it removes those.

    Args:
        starts_over: Whether earlier points in the run's folder are of a run that was killed before its first
            checkpoint, and so count for nothing.
    """

    def __init__(self, starts_over: bool = False) -> None:
        self.starts_over = starts_over
        self._restored: dict[str, Any] | None = None

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Flushes, and keeps what is not logged yet."""
        for logger in trainer.loggers:
            logger.save()
        last_step, step, metrics = unlogged_metrics(trainer)
        checkpoint[_CURVES_KEY] = {"last_step": last_step, "step": step, "metrics": metrics}

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remembers what the interrupted run had not logged."""
        self._restored = checkpoint.get(_CURVES_KEY)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs it."""
        restored, self._restored = self._restored, None
        if restored is None:
            restored = {"last_step": -1, "metrics": {}}
            if not self.starts_over:
                return
        for logger in trainer.loggers:
            if trainer.is_global_zero:
                discard_points_from(logger, restored["last_step"] + 1)
            if restored["metrics"]:
                logger.log_metrics(dict(restored["metrics"]), restored["step"])


def discard_points_from(logger: Logger, step: int) -> None:
    """Has TensorBoard or a CSV file forget points of this run that were written until now, from ``step`` on."""
    if isinstance(logger, CSVLogger) and isinstance(logger.experiment, ContinuedWriter):
        logger.experiment.discard_from(step)
    if not isinstance(logger, TensorBoardLogger):
        return
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    start = Event(step=step, session_log=SessionLog(status=SessionLog.START))
    writer = logger.experiment.file_writer
    writer.event_writer.add_event(start)
    writer.flush()


class RunConfigCallback(SaveConfigCallback):
    """Writes ``config.yaml`` as Lightning does, but never over that of another run.

    A fit has a folder of its own, or goes on in it; where a validation, test or prediction shares one, its
    configuration gets a number.
    """

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the file."""
        if self.already_saved:
            return
        folder = run_folder(trainer)
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / self.config_filename
            path = path if stage == "fit" else free_path(path)
            self.parser.save(self.config, str(path), skip_none=False, overwrite=True, multifile=self.multifile)
            self.save_config(trainer, pl_module, stage)
        self.already_saved = True
