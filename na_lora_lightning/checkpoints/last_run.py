"""Resuming the last run: which one that is, which of its checkpoints, and where its curves continue."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from na_lora_lightning.checkpoints.files import (
    SUFFIX,
    checkpoints_below,
    describe_content,
    newest_first,
    newest_intact,
)
from na_lora_lightning.checkpoints.run_folder import RunFolder, run_callback
from na_lora_lightning.checkpoints.run_folders import (
    CHECKPOINTS,
    first_logger,
    given_folder,
    is_remote,
    run_number,
    runs_root,
)
from na_lora_lightning.checkpoints.run_record import RunRecord, read_record
from na_lora_lightning.errors import CheckpointError, ConfigurationError

_MOST_NAMES = 5


class DamagedCheckpointWarning(UserWarning):
    """The newest checkpoint of the last run cannot be used, and an older one is."""


@dataclass
class LastRun:
    """What is left of the run that a trainer made last.

    Attributes:
        folder: Its folder; None if there is none, or if only the folder of its checkpoints is known.
        record: What it left to be known by.
        places: Where its checkpoints may be.
    """

    folder: Path | None = None
    record: RunRecord | None = None
    places: list[Path] = field(default_factory=list)

    def seen(self) -> list[str]:
        """Names of what it holds, apart from what a run that saved nothing leaves."""
        folders = ([] if self.folder is None else [self.folder]) + self.places
        names = [path.name for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())]
        return [name for name in dict.fromkeys(names) if not name.startswith(".") and name != CHECKPOINTS]


def continue_last_run(trainer: Trainer) -> str | None:
    """Prepares a trainer to go on with its last run, in the run's own folder.

    Args:
        trainer: Before its fit, with loggers that have not logged yet.

    Returns:
        The checkpoint to fit from; None where there is no run, or it never got to its first checkpoint, so that
        training begins.

    Raises:
        CheckpointError: There is a run, and none of its checkpoints can be used; says what is there.
    """
    run = find_last_run(trainer)
    path = _usable(trainer, run)
    if path is None:
        _require_unsaved(trainer, run)
        where = next((repr(str(place)) for place in run.places), f"below {str(runs_root(trainer) or _root(trainer))!r}")
        rank_zero_info(f"There is no checkpoint to resume from {where}, so training begins.")
    if run.record is not None or path is not None or (run.folder is not None and run.folder.is_dir()):
        (run_callback(trainer) or RunFolder()).adopt(trainer, run.folder, run.record)
    return None if path is None else str(path)


def last_checkpoint(trainer: Trainer) -> str:
    """The newest intact checkpoint of the trainer's last run, for an evaluation.

    Raises:
        CheckpointError: There is none.
    """
    run = find_last_run(trainer)
    path = _usable(trainer, run, trains=False)
    if path is None:
        where = " or ".join(repr(str(place)) for place in run.places) or repr(str(runs_root(trainer) or _root(trainer)))
        raise CheckpointError(
            f"ckpt_path is 'last', and there is no checkpoint in {where}; run fit first, or give the path of a file."
        )
    return str(path)


def newest_checkpoint(trainer: Trainer) -> str | None:
    """The newest checkpoint of the run under way, unchecked."""
    places = _named_folders(trainer) or find_last_run(trainer).places
    paths = newest_first(path for place in places for path in checkpoints_below(place, _suffixes(trainer)))
    return str(paths[0]) if paths else None


def require_training_state(path: str) -> None:
    """Checks that a fit can begin from a checkpoint.

    Raises:
        CheckpointError: It has weights alone.
    """
    reason = describe_content(Path(path))[0] if Path(path).is_file() else None
    if reason is not None:
        raise CheckpointError(
            f"training cannot resume from {path!r}, as {reason}; give a checkpoint that has it, or start over."
        )


def find_last_run(trainer: Trainer) -> LastRun:
    """Finds the run that a trainer made last.

    It is the one that owns the folder that a checkpoint callback names, or that has the version that the logger is
    given; else the newest below the folder of the trainer's first logger, or below ``default_root_dir``.
    """
    named = _named_folders(trainer)
    given, candidates = given_folder(trainer), _candidates(trainer)
    if named:
        record = next(filter(None, map(read_record, named)), None)
        known = [given] if given is not None else candidates
        folder = next((run for run in known if record is not None and _is_of(run, record)), None)
    else:
        folder = given if given is not None else next(iter(candidates), None)
        record = None if folder is None else read_record(folder)
    places = [*named, *([] if folder is None else [folder / CHECKPOINTS])]
    return LastRun(folder, record, places)


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
            f"the folder {str(folder)!r} for logs and checkpoints cannot be written to, as {reason}; set "
            "trainer.default_root_dir, or the save_dir of the logger, to another."
        )


def output_folders(trainer: Trainer) -> list[str]:
    """The folders below which a trainer writes."""
    logs = [logger.save_dir for logger in trainer.loggers if logger.save_dir]
    local = [*logs, *_named_folders(trainer)] if trainer.loggers else [trainer.default_root_dir]
    return [str(folder) for folder in local if not is_remote(folder)]


def _root(trainer: Trainer) -> str:
    logger = first_logger(trainer)
    return str((None if logger is None else logger.save_dir) or trainer.default_root_dir)


def _callbacks(trainer: Trainer) -> list[Checkpoint]:
    return list(trainer.checkpoint_callbacks)


def _named_folders(trainer: Trainer) -> list[Path]:
    callbacks = [callback for callback in _callbacks(trainer) if isinstance(callback, ModelCheckpoint)]
    named = [callback.dirpath for callback in callbacks if callback.dirpath is not None]
    return [Path(folder) for folder in named if not is_remote(folder)]


def _suffixes(trainer: Trainer) -> set[str]:
    return {SUFFIX, *(getattr(callback, "FILE_EXTENSION", SUFFIX) for callback in _callbacks(trainer))}


def _is_of(run: Path, record: RunRecord) -> bool:
    found = read_record(run)
    return found is not None and found.run == record.run


def _candidates(trainer: Trainer) -> list[Path]:
    """Folders of runs that trained, the newest first."""
    root = runs_root(trainer)
    folders = [path for path in root.iterdir() if path.is_dir()] if root is not None and root.is_dir() else []
    runs = [folder for folder in folders if _trained(folder)]
    numbered = [folder for folder in runs if run_number(folder) is not None]
    if numbered:
        return sorted(numbered, key=lambda folder: run_number(folder) or 0, reverse=True)
    if not runs and first_logger(trainer) is None and _trained(Path(trainer.default_root_dir)):
        return [Path(trainer.default_root_dir)]
    return sorted(runs, key=_time, reverse=True)


def _trained(folder: Path) -> bool:
    record = read_record(folder)
    if record is not None:
        return record.state != "untrained"
    return (folder / CHECKPOINTS).is_dir() or (folder / "adapter").is_dir()


def _time(run: Path) -> int:
    known = [run / CHECKPOINTS] if (run / CHECKPOINTS).is_dir() else [run]
    return max(path.stat().st_mtime_ns for path in known)


def _usable(trainer: Trainer, run: LastRun, trains: bool = True) -> Path | None:
    """The newest checkpoint that can be used; warns of newer ones."""
    suffixes = _suffixes(trainer)
    paths = [path for place in run.places for path in checkpoints_below(place, suffixes)]
    paths += [
        Path(callback.ckpt_path) for callback in _callbacks(trainer) if isinstance(callback, OnExceptionCheckpoint)
    ]
    # Where Lightning saves when a cluster takes the machine away.
    paths += Path(trainer.default_root_dir).glob(f"hpc_ckpt_*{SUFFIX}")
    path, unusable = newest_intact(paths, None if run.record is None else run.record.run, trains)
    for other, reason in unusable.items():
        if path is None:
            kind, _, detail = reason.partition(": ")
            raise CheckpointError(
                f"every checkpoint in {str(other.parent)!r} is {kind} ({other.name}: {detail}); give the path of "
                "another run's, or start over without ckpt_path."
            )
        rank_zero_warn(
            f"the checkpoint {str(other)!r} is {reason}; the newest intact one is used, {str(path)!r}.",
            category=DamagedCheckpointWarning,
        )
    return path


def _require_unsaved(trainer: Trainer, run: LastRun) -> None:
    """Refuses to start over where there was more than a run that saved nothing."""
    folder, seen = run.folder, run.seen()
    if run.record is not None:
        is_lost = run.record.state in ("saved", "ended")
    elif folder is not None and (folder / CHECKPOINTS).is_dir():
        # Of a run that was killed before its first checkpoint there is no more than logs.
        is_lost = (folder / "adapter").exists()
    else:
        is_lost = bool(seen)
    if folder is None and not seen and run.record is None:
        # Nothing was found, and something may have been overlooked.
        root = runs_root(trainer)
        others = [] if root is None or not root.is_dir() else [path for path in root.iterdir() if _is_strange(path)]
        if others and not _named_folders(trainer):
            folder, is_lost = max(others, key=lambda path: run_number(path) or 0), True
            seen = LastRun(folder).seen()
    if is_lost:
        place = folder or run.places[0]
        names = ", ".join(seen[:_MOST_NAMES]) + (", ..." if len(seen) > _MOST_NAMES else "") or "nothing else"
        raise CheckpointError(
            f"ckpt_path is 'last', and the last run, in {str(place)!r}, has no checkpoint to resume from (it holds "
            f"{names}); give the path of a checkpoint, or start over without ckpt_path."
        )


def _is_strange(folder: Path) -> bool:
    """Whether a numbered folder holds something of which no record says what it is."""
    if run_number(folder) is None or not folder.is_dir() or read_record(folder) is not None:
        return False
    # A run that was killed as it made the folder leaves no more than a part of its record.
    return any(not path.name.startswith(".") for path in folder.iterdir())
