"""Fits that are stopped from outside: by a signal, or by a disk that is full."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from na_lora_lightning.checkpoints.last_run import newest_checkpoint
from na_lora_lightning.errors import CheckpointError, one_line
from na_lora_lightning.lightning_internals import cluster_environment

# What a disk, not a program, does wrong.
_STORAGE_ERRORS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EACCES", "EPERM", "ENOTDIR", "ESTALE")
    if hasattr(errno, name)
}


@contextmanager
def stopped_from_outside(trainer: Trainer) -> Iterator[None]:
    """Says in one sentence why a fit stopped, and from which checkpoint it goes on.

    Raises:
        SystemExit: A signal stopped it; with the status that a shell reports of such a command, 143 for SIGTERM.
        CheckpointError: A file could not be written.
    """
    try:
        yield
    except SystemExit as request:
        if not trainer.interrupted:
            raise
        number = signal.SIGTERM if isinstance(request, SIGTERMException) else signal.SIGINT
        if trainer.is_global_zero:
            steps = trainer.global_step
            print(f"Stopped by {number.name} after {steps} optimizer steps; {_way_on(trainer)}.", file=sys.stderr)
        raise SystemExit(128 + number) from request
    except OSError as error:
        if error.errno not in _STORAGE_ERRORS:
            raise
        place = f" {error.filename!r}" if error.filename else " logs"
        raise CheckpointError(
            f"writing{place} failed after {trainer.global_step} optimizer steps ({error.strerror}), so make room or "
            f"choose another folder; {_way_on(trainer)}."
        ) from error


def _way_on(trainer: Trainer) -> str:
    checkpoint = newest_checkpoint(trainer)
    if checkpoint is None:
        return "there is no checkpoint yet, so begin again"
    return f"resume with --ckpt_path last, which is {checkpoint!r}"


@contextmanager
def quiet_writers() -> Iterator[None]:
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


class RequeueRequest:
    """SLURM's word that a job's time is nearly up, kept until the optimizer step under way is finished.

    Lightning's own handler saves at once, which is within a step, and with several processes in another place of each,
    so that they wait for one another for ever. Who wants it acted on calls :meth:`is_made` in every process after a
    step, saves, and calls :meth:`requeue`.
    """

    def __init__(self) -> None:
        self._told = False
        self._environment: SLURMEnvironment | None = None

    def listen(self, trainer: Trainer) -> None:
        """Takes the place of Lightning's handler, which removes this one at the end of the fit."""
        environment = cluster_environment(trainer)
        if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
            return
        self._environment = environment
        if threading.current_thread() is threading.main_thread():
            assert environment.requeue_signal is not None
            signal.signal(environment.requeue_signal, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._told = True

    def is_made(self, trainer: Trainer) -> bool:
        """Whether any process was told."""
        if self._environment is None:
            return False
        return trainer.strategy.reduce_boolean_decision(self._told, all=False)

    def requeue(self, trainer: Trainer) -> None:
        """Has SLURM end the job and begin it again; warns where it does not."""
        self._told = False
        if not trainer.is_global_zero:
            return
        array = os.environ.get("SLURM_ARRAY_JOB_ID")
        job = os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        print(
            f"SLURM asks job {job} to end: it is queued again after {trainer.global_step} optimizer steps.", flush=True
        )
        try:
            subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or error
            rank_zero_warn(
                f"job {job} could not be queued again ({one_line(reason)}), so training goes on; submit it once more "
                "with --ckpt_path last when it has ended."
            )
