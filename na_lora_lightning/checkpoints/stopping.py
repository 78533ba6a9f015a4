"""Fits that are stopped from outside: by a signal, or by a disk that is full."""

from __future__ import annotations

import errno
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from na_lora_lightning.checkpoints.last_run import newest_checkpoint
from na_lora_lightning.errors import CheckpointError

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
