"""Going on with the last run: which one that is, which of its checkpoints, and where its curves continue."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from na_lora_lightning.checkpointing import SUFFIX, newest_first, newest_intact
from na_lora_lightning.errors import CheckpointError, ConfigurationError

_FOLDER = "checkpoints"


class DamagedCheckpointWarning(UserWarning):
    """The newest checkpoint of the last run is damaged, and an older one is used."""


def checkpoint_folders(trainer: Trainer) -> list[Path]:
    """Where the trainer's last run has its checkpoints.

    That is the folder that a checkpoint callback names; else ``checkpoints`` in the newest run below the first
    logger's folder that has one; else that of the trainer's ``default_root_dir``.
    """
    named = [Path(folder) for folder in _named_folders(trainer)]
    if named:
        return named
    if not trainer.loggers:
        return [Path(trainer.default_root_dir) / _FOLDER]
    return [run / _FOLDER for run in _runs(trainer.loggers[0], trainer)[:1]]


def continue_last_run(trainer: Trainer) -> str | None:
    """Prepares a trainer to go on with its last run, in the run's own folder.

    Args:
        trainer: Before its fit, with loggers that have not logged yet.

    Returns:
        The checkpoint to fit from; None where the last run has none, or there is no run, so that training begins.

    Raises:
        CheckpointError: The last run has checkpoints, and all are damaged.
    """
    folders = checkpoint_folders(trainer)
    path = _usable(folders)
    if not _named_folders(trainer):
        _continue_logs(trainer, folders)
    if path is None:
        where = repr(str(folders[0])) if folders else f"below {_log_root(trainer)!r}"
        rank_zero_info(f"There is no checkpoint to go on from {where}, so training begins.")
    return path


def last_checkpoint(trainer: Trainer) -> str:
    """The newest intact checkpoint of the trainer's last run.

    Raises:
        CheckpointError: There is none.
    """
    folders = checkpoint_folders(trainer)
    path = _usable(folders)
    if path is None:
        where = " or ".join(repr(str(folder)) for folder in folders) or repr(_log_root(trainer))
        raise CheckpointError(
            f"ckpt_path is 'last', and there is no checkpoint in {where}; run fit first, or give the path of a file."
        )
    return path


def newest_checkpoint(trainer: Trainer) -> str | None:
    """The newest checkpoint of the run under way, unchecked."""
    folders = _named_folders(trainer) or [str(folder) for folder in checkpoint_folders(trainer)]
    files = newest_first(file for folder in folders for file in Path(folder).glob(f"*{SUFFIX}"))
    return str(files[0]) if files else None


def require_writable(folders: Iterable[str | Path]) -> None:
    """Checks that files can be made below folders, without making any.

    Raises:
        ConfigurationError: They cannot be; names the folder.
    """
    for folder in folders:
        place = Path(folder).expanduser().absolute()
        existing = next(parent for parent in [place, *place.parents] if parent.exists())
        if not existing.is_dir():
            reason = f"{str(existing)!r} is a file"
        elif not os.access(existing, os.W_OK | os.X_OK):
            reason = f"writing to {str(existing)!r} is not allowed"
        else:
            continue
        raise ConfigurationError(
            f"The folder {str(folder)!r} for logs and checkpoints cannot be written to, as {reason}; set "
            "trainer.default_root_dir, or the save_dir of the logger, to another."
        )


def output_folders(trainer: Trainer) -> list[str]:
    """The folders below which a trainer writes."""
    logs = [logger.save_dir for logger in trainer.loggers if logger.save_dir]
    local = [*logs, *_named_folders(trainer)] if trainer.loggers else [trainer.default_root_dir]
    return [str(folder) for folder in local if "://" not in str(folder)]


def _named_folders(trainer: Trainer) -> list[str]:
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return [str(callback.dirpath) for callback in callbacks if callback.dirpath is not None]


def _log_root(trainer: Trainer) -> str:
    logger = trainer.loggers[0] if trainer.loggers else None
    folder = (logger.save_dir if logger is not None else None) or trainer.default_root_dir
    return str(folder)


def _runs(logger: Logger, trainer: Trainer) -> list[Path]:
    """Folders of the runs that were there to be checkpointed, the newest first."""
    save_dir = Path(logger.save_dir or trainer.default_root_dir)
    if isinstance(logger, (TensorBoardLogger, CSVLogger)):
        root = save_dir / str(logger.name)
        if logger._version is not None:
            given = logger._version
            return [root / (given if isinstance(given, str) else f"version_{given}")]
        folders = root.glob("*")
    else:
        # Others may ask a server for the name.
        folders = save_dir.glob("*/*")
    runs = [folder for folder in folders if (folder / _FOLDER).is_dir()]
    numbered = [folder for folder in runs if _number(folder) is not None]
    if numbered:
        return sorted(numbered, key=lambda folder: _number(folder) or 0, reverse=True)
    return sorted(runs, key=lambda folder: (folder / _FOLDER).stat().st_mtime_ns, reverse=True)


def _number(run: Path) -> int | None:
    prefix, _, number = run.name.partition("_")
    return int(number) if prefix == "version" and number.isdigit() else None


def _usable(folders: Sequence[Path]) -> str | None:
    path, damaged = newest_intact(file for folder in folders for file in folder.glob(f"*{SUFFIX}"))
    for file, reason in damaged.items():
        if path is None:
            raise CheckpointError(
                f"Every checkpoint in {str(file.parent)!r} is damaged ({file.name}: {reason}); give the path of "
                "another run's, or begin anew without ckpt_path."
            )
        rank_zero_warn(
            f"The checkpoint {str(file)!r} is damaged: {reason}; the newest intact one is used, {str(path)!r}.",
            category=DamagedCheckpointWarning,
        )
    return None if path is None else str(path)


def _continue_logs(trainer: Trainer, folders: Sequence[Path]) -> None:
    """Has TensorBoard's curves go on in the folder of the run; other loggers would overwrite it."""
    logger = trainer.loggers[0] if trainer.loggers else None
    if isinstance(logger, TensorBoardLogger) and folders and logger._version is None:
        run = folders[0].parent.name
        number = _number(folders[0].parent)
        logger._version = run if number is None else number
