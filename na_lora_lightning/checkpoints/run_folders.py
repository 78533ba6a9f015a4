"""Which folder a run has, by its loggers; CSV curves that continue there; and which paths are the same place."""

from __future__ import annotations

import csv
import io
import os
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch import Tensor
from typing_extensions import override

from na_lora_lightning.checkpoints.files import replace_file
from na_lora_lightning.checkpoints.run_record import RunRecord
from na_lora_lightning.lightning_internals import (
    give_csv_writer,
    mlflow_experiment,
    require_csv_writer,
    set_version,
    version_of,
)

CHECKPOINTS = "checkpoints"
# Lightning's own name for runs that have no other.
_UNNAMED = "lightning_logs"


def is_dry_run(trainer: Trainer) -> bool:
    """Whether the trainer only tries a few batches, so that nothing is to be written."""
    return bool(getattr(trainer, "fast_dev_run", False))


def is_first_process() -> bool:
    """Whether this is the process that writes, also before the trainer has its place among others."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def first_logger(trainer: Trainer) -> Logger | None:
    """The logger after which the run's folder is named."""
    logger = trainer.loggers[0] if trainer.loggers else None
    return None if isinstance(logger, DummyLogger) else logger


def is_remote(folder: object) -> bool:
    """Whether a folder is an address, which is left to Lightning."""
    return "://" in str(folder)


def runs_root(trainer: Trainer) -> Path | None:
    """The folder in which every run like this one has its own; None where it is remote, or has none yet."""
    logger = first_logger(trainer)
    if logger is None:
        root = Path(trainer.default_root_dir) / _UNNAMED
    else:
        name = _series(logger)
        if name is None:
            return None
        root = Path(logger.save_dir or trainer.default_root_dir) / name
    return None if is_remote(trainer.default_root_dir if logger is None else logger.save_dir) else root


def given_folder(trainer: Trainer) -> Path | None:
    """The run's folder where it is settled: by the user's version, or because the logger has begun."""
    root, logger = runs_root(trainer), first_logger(trainer)
    version = None if logger is None else version_of(logger)
    return None if root is None or version is None else root / _folder_name(version)


def begun_folder(trainer: Trainer) -> Path | None:
    """The run's folder by a logger that has begun; None without a logger, and where it is remote."""
    logger = first_logger(trainer)
    if logger is None or is_remote(logger.save_dir):
        return None
    folder = Path(logger.save_dir or trainer.default_root_dir)
    return folder / str(logger.name) / _folder_name(logger.version)


def reserve_folder(trainer: Trainer) -> Path | None:
    """Makes the next free numbered folder, which no other process can then make.

    Returns:
        The folder; None where the logger names it itself.
    """
    logger, root = first_logger(trainer), runs_root(trainer)
    if root is None or not (logger is None or isinstance(logger, (TensorBoardLogger, CSVLogger))):
        return None
    root.mkdir(parents=True, exist_ok=True)
    number = max((number for path in root.iterdir() if (number := run_number(path)) is not None), default=-1) + 1
    while True:
        folder = root / f"version_{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
            continue
        if logger is not None:
            set_version(logger, number)
        return folder


def run_number(run: Path) -> int | None:
    """N of a folder ``version_N``."""
    prefix, _, number = run.name.partition("_")
    return int(number) if prefix == "version" and number.isdigit() else None


def continue_loggers(trainer: Trainer, folder: Path, record: RunRecord | None) -> bool:
    """Has the loggers go on with what they wrote for a run.

    Args:
        trainer: Its loggers have not begun.
        folder: The run's.
        record: The run's, if it left one.

    Returns:
        Whether the first logger names this folder now.
    """
    number = run_number(folder)
    former = (
        record.loggers if record is not None and record.loggers else [("", folder.name if number is None else number)]
    )
    for index, logger in enumerate(trainer.loggers[: len(former)]):
        kind, version = former[index]
        if (kind or type(logger).__name__) != type(logger).__name__ or version is None:
            continue
        if version_of(logger) is None and not set_version(logger, version):
            rank_zero_info(f"{type(logger).__name__} cannot continue {version!r}, so it shows the rest as a new run.")
    continue_csv_files(trainer)
    return given_folder(trainer) == folder


def continue_csv_files(trainer: Trainer) -> None:
    """Has CSV loggers keep what is in their folders."""
    for logger in trainer.loggers if is_first_process() else []:
        if isinstance(logger, CSVLogger) and not is_remote(logger.save_dir):
            give_csv_writer(logger, partial(ContinuedWriter, logger.log_dir))


def describe_loggers(trainer: Trainer) -> list[tuple[str, Any]]:
    """What :func:`continue_loggers` needs."""
    return [(type(logger).__name__, logger.version) for logger in trainer.loggers]


def _series(logger: Logger) -> str | None:
    """What the runs of a logger have in common, without making a new one."""
    if isinstance(logger, MLFlowLogger):
        return mlflow_experiment(logger)
    return str(logger.name)


def _folder_name(version: Any) -> str:
    return version if isinstance(version, str) else f"version_{version}"


# Device and inode of the nearest parent that exists, and the names below it.
_Identity = tuple[int, int, tuple[str, ...]]


def same_path(first: str | Path, second: str | Path) -> bool:
    """Whether two paths lead to the same file or folder, which need not exist yet.

    Args:
        first: A path; ``~`` stands for the user's home.
        second: Another.
    """
    return _identity(_resolved(first)) == _identity(_resolved(second))


def is_within(path: str | Path, folder: str | Path) -> bool:
    """Whether a path leads to a folder itself, or to something in it; neither needs to exist yet.

    Args:
        path: A path; ``~`` stands for the user's home.
        folder: The folder.
    """
    place, outer = _resolved(path), _identity(_resolved(folder))
    return any(_identity(parent) == outer for parent in (place, *place.parents))


def _resolved(path: str | Path) -> Path:
    place = Path(path).expanduser()
    try:
        return place.resolve()
    except (OSError, RuntimeError):
        # A link that leads to itself.
        return place.absolute()


def _identity(place: Path) -> _Identity:
    # Names say too little: of two mounts of a folder, or on a disk that takes capitals for small letters.
    for parent in (place, *place.parents):
        try:
            status = parent.stat()
        except OSError:
            continue
        below = place.relative_to(parent).parts
        return status.st_dev, status.st_ino, tuple(os.path.normcase(name) for name in below)
    return 0, 0, place.parts


class ContinuedWriter(ExperimentWriter):
    """Appends to the ``metrics.csv`` of a folder, so that a kill at any moment leaves what was saved.

    Args:
        log_dir: Folder of the run.
    """

    def __init__(self, log_dir: str) -> None:
        require_csv_writer()
        super().__init__(log_dir)
        self._path = Path(self.metrics_file_path)
        self._earlier: set[frozenset[tuple[str, str]]] = set()
        if self._path.is_file():
            self._keep([row for row in self._rows() if row.get("step")])

    def discard_from(self, step: int) -> None:
        """Drops the rows of this step and later ones, which an interrupted run had written."""
        if self._path.is_file():
            self._keep([row for row in self._rows() if float(row["step"]) < step])

    @override
    def log_metrics(self, metrics_dict: dict[str, Any], step: int | None = None) -> None:
        """Takes a row, unless the file has it from before an interruption."""
        super().log_metrics(metrics_dict, step)
        if _row_identity(self.metrics[-1]) in self._earlier:
            self.metrics.pop()

    @override
    def _check_log_dir_exists(self) -> None:
        """Deletes nothing."""

    @override
    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._write(fieldnames, self._rows())

    def _rows(self) -> list[dict[str, str]]:
        text = self._path.read_text(encoding="utf-8")
        # The last line may be half of one.
        return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))

    def _keep(self, rows: list[dict[str, str]]) -> None:
        fieldnames = list(rows[0]) if rows else []
        self.metrics_keys = fieldnames
        self._earlier = {_row_identity(row) for row in rows}
        if rows:
            self._write(fieldnames, rows)
        else:
            self._path.unlink()

    def _write(self, fieldnames: list[str], rows: list[dict[str, str]]) -> None:
        content = io.StringIO(newline="")
        writer = csv.DictWriter(content, fieldnames=fieldnames)
        writer.writeheader()
        writer.writerows(rows)
        replace_file(self._path, content.getvalue().encode())


def _row_identity(row: dict[str, Any]) -> frozenset[tuple[str, str]]:
    values = {name: value.item() if isinstance(value, Tensor) else value for name, value in row.items()}
    return frozenset((name, str(value)) for name, value in values.items() if value not in ("", None))
