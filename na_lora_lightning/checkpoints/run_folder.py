"""Each run has a folder of its own, and no run writes over another's files."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from typing_extensions import override

from na_lora_lightning.checkpoints.adapter_state import require_adapter_folder
from na_lora_lightning.checkpoints.files import RUN_FILE, RUN_KEY, checkpoints_below, describe_content
from na_lora_lightning.checkpoints.run_folders import (
    CHECKPOINTS,
    begun_folder,
    continue_csv_files,
    continue_loggers,
    describe_loggers,
    first_logger,
    given_folder,
    is_dry_run,
    is_first_process,
    is_remote,
    is_within,
    reserve_folder,
    same_path,
)
from na_lora_lightning.checkpoints.run_record import Hold, RunRecord, hold_adapter, hold_folder, read_record
from na_lora_lightning.errors import ConfigurationError


class RunFolder(Callback):
    """Gives a run its folder, leaves a record there, and refuses folders that hold another run's files.

    :meth:`begin` is to be called before the trainer's fit, validation, test or prediction.

    Attributes:
        folder: Where the run writes; None before it is known, and for a remote one.
        record: What says so in that folder, in those of its checkpoints, and in the checkpoints.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.record = RunRecord()
        self._adopted = False
        self._checkpoints_follow = False
        self._places: list[Path] = []
        self._holds: list[Hold] = []
        self._is_saved = False

    def adopt(self, trainer: Trainer, folder: Path | None, record: RunRecord | None) -> None:
        """Goes on with an earlier run.

        Args:
            trainer: Its loggers have not begun.
            folder: The run's folder, where it is known.
            record: What the run left.
        """
        self._adopted = True
        self.record = record or self.record
        if folder is not None:
            self.folder = folder
            self._checkpoints_follow = not continue_loggers(trainer, folder, record)

    @property
    def run_folder(self) -> Path | None:
        """The folder, by the name under which other callbacks ask for it."""
        return self.folder

    def begin(self, trainer: Trainer, checkpoint: str | None = None, trains: bool = True) -> None:
        """Chooses a folder, unless the run has one.

        Args:
            trainer: Its loggers have not begun.
            checkpoint: What a fit begins from, if it is a file.
            trains: Whether it is a fit.
        """
        if is_dry_run(trainer):
            return
        if self.folder is None and (given := given_folder(trainer)) is not None:
            self.folder = given
            if checkpoint is not None and is_within(checkpoint, given):
                self._adopted, self.record = True, read_record(given) or self.record
        if self.folder is None and is_first_process():
            self.folder = reserve_folder(trainer)
            if self.folder is not None:
                # Before anything else is in it, so that whatever a kill leaves is known.
                RunRecord(self.record.run, "begun" if trains else "untrained").write(self.folder)
                self._places = [self.folder] if trains else []
        continue_csv_files(trainer)
        if self.folder is not None and (self._checkpoints_follow or first_logger(trainer) is None):
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                    callback.dirpath = str(self.folder / CHECKPOINTS)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes possession of the folders that the run is going to write to.

        Raises:
            ConfigurationError: One of them holds what another run wrote, or is in use by another process.
        """
        if is_dry_run(trainer):
            return
        self.folder = trainer.strategy.broadcast(self.folder or begun_folder(trainer))
        if not trainer.is_global_zero:
            return
        self.record.loggers = describe_loggers(trainer)
        if stage == "fit":
            for place, option in self._wanted(trainer):
                self._holds.append(hold_folder(place))
                self._require_own(place, option)
                self._places = list(dict.fromkeys([*self._places, place]))
                self.record.write(place)
            self._require_own_exceptions(trainer)
        elif self.folder is not None and not self._is_trained(self.folder):
            RunRecord(self.record.run, "untrained", self.record.loggers).write(self.folder)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Notes that there is a checkpoint."""
        self._note_checkpoints()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes that the run has ended."""
        self._set_state("ended")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves no trace of a fit that failed before it began."""
        self._note_checkpoints()
        if trainer.global_step == 0 and not self._adopted and self.record.state == "begun":
            self._set_state("untrained")
            for place in self._places:
                with suppress(OSError):
                    (place / CHECKPOINTS).rmdir()
                if all(path.name.startswith(".na_lora") for path in place.iterdir()):
                    (place / RUN_FILE).unlink()
        self._release()
        if self.folder is not None and trainer.is_global_zero:
            # If nothing is left in it.
            with suppress(OSError):
                self.folder.rmdir()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets others have the folders."""
        self._release()

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Says in the checkpoint whose it is."""
        checkpoint[RUN_KEY] = self.record.run
        self._is_saved = True

    def _wanted(self, trainer: Trainer) -> list[tuple[Path, str]]:
        wanted = [] if self.folder is None else [(self.folder, "the logger's version, or trainer.default_root_dir")]
        for callback in trainer.checkpoint_callbacks:
            if (
                isinstance(callback, ModelCheckpoint)
                and callback.dirpath is not None
                and not is_remote(callback.dirpath)
            ):
                place = Path(callback.dirpath)
                if not any(is_within(place, known) for known, _ in wanted):
                    wanted.append((place, "the dirpath of its checkpoints"))
        return wanted

    def _require_own(self, place: Path, option: str) -> None:
        record = read_record(place)
        if self._adopted and (record is None or record.run == self.record.run):
            return
        if record is not None and record.run == self.record.run:
            return
        is_used = bool(checkpoints_below(place)) or (place / "adapter").exists()
        if is_used or (record is not None and record.state in ("saved", "ended")):
            raise ConfigurationError(
                f"the folder {str(place)!r} holds another run, which this one would write over; go on with that one "
                f"(--ckpt_path last), or give this one a folder of its own by {option}."
            )

    def _require_own_exceptions(self, trainer: Trainer) -> None:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, OnExceptionCheckpoint) and (path := Path(callback.ckpt_path)).exists():
                owner = describe_content(path)[1]
                if owner != self.record.run and not (self._adopted and owner is None):
                    raise ConfigurationError(
                        f"the checkpoint {str(path)!r} is of another run, and this one would write over it; go on with "
                        "that one (--ckpt_path last), or give this one's OnExceptionCheckpoint another dirpath."
                    )

    def _note_checkpoints(self) -> None:
        if self._is_saved and self.record.state == "begun" and any(map(checkpoints_below, self._places)):
            self._set_state("saved")

    def _set_state(self, state: Any) -> None:
        self.record.state = state
        for place in self._places:
            self.record.write(place)

    @staticmethod
    def _is_trained(folder: Path) -> bool:
        record = read_record(folder)
        return record is not None and record.state != "untrained"

    def hold(self, hold: Hold) -> None:
        """Keeps something that the run writes to until it ends."""
        self._holds.append(hold)

    def _release(self) -> None:
        holds, self._holds = self._holds, []
        for hold in holds:
            hold.release()


def run_callback(trainer: Trainer) -> RunFolder | None:
    """The trainer's :class:`RunFolder`, if it has one."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, RunFolder)), None)


def run_folder(trainer: Trainer) -> Path:
    """The folder for what a run leaves beside its checkpoints; every process has to ask.

    That is where TensorBoard's and CSV's logs are; for other loggers the folder that Lightning makes the checkpoints of
    the run in; without any, that of the trainer's :class:`RunFolder`, and else its ``default_root_dir``.
    """
    logger, callback = first_logger(trainer), run_callback(trainer)
    if callback is not None and callback.folder is not None and not isinstance(logger, (TensorBoardLogger, CSVLogger)):
        return callback.folder
    if isinstance(logger, (TensorBoardLogger, CSVLogger)):
        return Path(str(trainer.log_dir))
    folder = begun_folder(trainer) if trainer.is_global_zero else None
    return Path(trainer.strategy.broadcast(folder) or trainer.default_root_dir)


def require_own_adapter(trainer: Trainer, folder: Path, is_named: bool, written: Path | None) -> None:
    """Refuses a folder for the adapter that another run has written to, or is going to.

    Args:
        trainer: In its fit.
        folder: The adapter's.
        is_named: Whether the user chose it, so that other runs may have been given it too.
        written: Where the module has written its adapter already.

    Raises:
        ConfigurationError: It holds the adapter of another run, or something else, or another process is to write it.
    """
    require_adapter_folder(folder)
    run = run_callback(trainer)
    if run is not None:
        if is_named and trainer.is_global_zero:
            run.hold(hold_adapter(folder))
        record = read_record(folder)
        is_own = record is not None and record.run == run.record.run
        is_own = is_own or (run.folder is not None and is_within(folder, run.folder))
    else:
        is_own = trainer.ckpt_path is not None or (written is not None and same_path(folder, written))
    if folder.exists() and any(folder.iterdir()) and not is_own:
        raise ConfigurationError(
            f"the folder {str(folder)!r} holds the adapter of another run, which this one would replace; set "
            "adapter.folder to another, remove that one, or go on with its run (--ckpt_path last)."
        )


def free_path(path: Path) -> Path:
    """The path, or the first of ``name.2.suffix``, ``name.3.suffix``, ... that is not taken."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}.{number}{path.suffix}")
    return free
