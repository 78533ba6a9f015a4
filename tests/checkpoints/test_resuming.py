"""Which run and which of its checkpoints ``--ckpt_path last`` means; ``test_run_folders.py`` has whole runs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from module_helpers import quiet_trainer

from na_lora_lightning.checkpoints.files import RUN_KEY
from na_lora_lightning.checkpoints.last_run import (
    DamagedCheckpointWarning,
    continue_last_run,
    last_checkpoint,
    require_training_state,
)
from na_lora_lightning.checkpoints.run_record import RunRecord
from na_lora_lightning.errors import CheckpointError


def checkpoint(path: Path, age: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {"a": torch.ones(10)}, "optimizer_states": []}, path)
    os.utime(path, ns=(10**18 - age, 10**18 - age))
    return path


def test_last_is_of_the_newest_run_that_trained(tmp_path: Path) -> None:
    older = checkpoint(tmp_path / "x" / "version_9" / "checkpoints" / "a.ckpt")
    newer = checkpoint(tmp_path / "x" / "version_10" / "checkpoints" / "a.ckpt", age=1)
    # A validation: no checkpoints.
    (tmp_path / "x" / "version_11").mkdir()
    logger = TensorBoardLogger(tmp_path, name="x")
    trainer = quiet_trainer(tmp_path, logger=logger, enable_checkpointing=True)
    assert last_checkpoint(trainer) == str(newer)
    assert logger._version is None
    assert continue_last_run(trainer) == str(newer)
    assert logger.log_dir == str(tmp_path / "x" / "version_10")
    assert older.exists()


def test_last_of_a_run_without_checkpoints_begins_in_its_folder(tmp_path: Path) -> None:
    checkpoint(tmp_path / "x" / "version_0" / "checkpoints" / "a.ckpt")
    (tmp_path / "x" / "version_1" / "checkpoints").mkdir(parents=True)
    logger = TensorBoardLogger(tmp_path, name="x")
    trainer = quiet_trainer(tmp_path, logger=logger, enable_checkpointing=True)
    assert continue_last_run(trainer) is None
    assert logger.version == 1
    with pytest.raises(CheckpointError, match=r"there is no checkpoint in '.*version_1/checkpoints'; run fit first"):
        last_checkpoint(trainer)


def test_last_without_a_logger_and_in_named_folders(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "checkpoints" / "a.ckpt")
    assert last_checkpoint(quiet_trainer(tmp_path, enable_checkpointing=True)) == str(path)
    named = checkpoint(tmp_path / "elsewhere" / "a.ckpt")
    saver = ModelCheckpoint(tmp_path / "elsewhere")
    trainer = quiet_trainer(
        tmp_path, enable_checkpointing=True, callbacks=[saver], logger=CSVLogger(tmp_path, name="csv")
    )
    assert continue_last_run(trainer) == str(named)
    # Nothing says which curves belong to them.
    assert trainer.logger is not None
    assert trainer.logger.version == 0
    csv = checkpoint(tmp_path / "csv" / "version_0" / "checkpoints" / "a.ckpt")
    trainer = quiet_trainer(tmp_path, enable_checkpointing=True, logger=CSVLogger(tmp_path, name="csv"))
    assert continue_last_run(trainer) == str(csv)
    assert trainer.logger is not None
    assert trainer.logger.version == 0


def test_damaged_checkpoints_are_passed_over_by_name(tmp_path: Path) -> None:
    before = checkpoint(tmp_path / "checkpoints" / "before.ckpt", age=1)
    newest = checkpoint(tmp_path / "checkpoints" / "newest.ckpt")
    newest.write_bytes(newest.read_bytes()[:100])
    trainer = quiet_trainer(tmp_path, enable_checkpointing=True)
    with pytest.warns(DamagedCheckpointWarning, match=r"newest\.ckpt' is damaged: it is incomplete; .*before\.ckpt'\."):
        assert continue_last_run(trainer) == str(before)
    before.write_bytes(b"")
    # Written just now both, and a file's time may be too coarse to tell which was later.
    os.utime(newest, ns=(0, 0))
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged \(before\.ckpt: it is empty\)"):
        continue_last_run(trainer)


# ---- any file name ----


def saver(**options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(**options)


@pytest.mark.parametrize(
    "names",
    [
        # The newest first. A slash in a metric's name makes folders, with its name in front or without.
        ["epoch=1-validation/loss=0.214.ckpt", "epoch=0-validation/loss=0.300.ckpt"],
        ["1-0.214/a/b/c.ckpt", "last.ckpt"],
        ["last-v1.ckpt", "last.ckpt", "epoch=0-step=4.ckpt"],
        ["epoch=0-step=4-v2.ckpt", "epoch=0-step=4-v1.ckpt", "epoch=0-step=4.ckpt"],
        ["weird [name] {x}.ckpt", "*.ckpt"],
    ],
)
@pytest.mark.parametrize("is_named", [False, True])
def test_checkpoints_of_any_name_are_found(tmp_path: Path, names: list[str], is_named: bool) -> None:
    folder = tmp_path / ("elsewhere" if is_named else "lightning_logs/version_0/checkpoints")
    paths = [checkpoint(folder / name, age) for age, name in enumerate(names)]
    (folder / ".hidden").mkdir()
    checkpoint(folder / ".hidden" / "a.ckpt")
    callback = saver(dirpath=folder if is_named else None)
    trainer = quiet_trainer(tmp_path, enable_checkpointing=True, callbacks=[callback])
    assert continue_last_run(trainer) == str(paths[0])
    assert callback.dirpath == (str(folder) if is_named else None)


def test_a_link_is_the_file_that_it_leads_to(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    path = checkpoint(folder / "epoch=0.ckpt")
    (folder / "last.ckpt").symlink_to("epoch=0.ckpt")
    (folder / "gone.ckpt").symlink_to("removed.ckpt")
    trainer = quiet_trainer(tmp_path, enable_checkpointing=True)
    assert last_checkpoint(trainer) == str(path)
    path.rename(tmp_path / "kept elsewhere")
    (folder / "last.ckpt").unlink()
    (folder / "last.ckpt").symlink_to(tmp_path / "kept elsewhere")
    assert last_checkpoint(trainer) == str(folder / "last.ckpt")


def test_other_suffixes_several_callbacks_and_other_places(tmp_path: Path) -> None:
    class Other(ModelCheckpoint):
        FILE_EXTENSION = ".pt"

    callbacks = [Other(tmp_path / "a"), saver(dirpath=tmp_path / "b", monitor="x"), OnExceptionCheckpoint(tmp_path)]
    trainer = quiet_trainer(tmp_path, enable_checkpointing=True, callbacks=callbacks)
    expected = [
        checkpoint(tmp_path / "b" / "z.ckpt", 4),
        checkpoint(tmp_path / "a" / "z.pt", 3),
        # Where Lightning saves as a cluster takes the machine away, and as a fit fails.
        checkpoint(tmp_path / "hpc_ckpt_2.ckpt", 2),
        checkpoint(tmp_path / "on_exception.ckpt", 1),
    ]
    for path in reversed(expected):
        assert last_checkpoint(trainer) == str(path)
        path.unlink()


def test_sharded_checkpoints_are_folders(tmp_path: Path) -> None:
    older = checkpoint(tmp_path / "checkpoints" / "a.ckpt" / "meta.pt", 2).parent
    (older / ".metadata").write_text("")
    os.utime(older / ".metadata", ns=(1, 1))
    os.utime(older, ns=(1, 1))
    half = tmp_path / "checkpoints" / "b.ckpt"
    half.mkdir()
    (half / "__0_0.distcp").write_text("")
    trainer = quiet_trainer(tmp_path, enable_checkpointing=True)
    with pytest.warns(DamagedCheckpointWarning, match=r"b\.ckpt' is damaged: it is incomplete; the newest .*a\.ckpt'"):
        assert continue_last_run(trainer) == str(older)
    deepspeed = tmp_path / "checkpoints" / "c.ckpt" / "checkpoint"
    deepspeed.mkdir(parents=True)
    assert continue_last_run(trainer) == str(deepspeed.parent)


def test_weights_alone_are_nothing_to_go_on_from(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "checkpoints" / "a.ckpt")
    torch.save({"state_dict": {}, "loops": {}}, path)
    trainer = quiet_trainer(tmp_path, enable_checkpointing=True)
    reason = "it has the weights alone (save_weights_only), and not the state of training"
    with pytest.raises(CheckpointError) as caught:
        continue_last_run(trainer)
    assert str(caught.value) == (
        f"every checkpoint in {str(path.parent)!r} is unusable (a.ckpt: {reason}); give the path of another run's, or "
        "start over without ckpt_path."
    )
    # They can be evaluated.
    assert last_checkpoint(trainer) == str(path)
    with pytest.raises(CheckpointError) as caught:
        require_training_state(str(path))
    assert str(caught.value) == (
        f"training cannot resume from {str(path)!r}, as {reason}; give a checkpoint that has it, or start over."
    )
    checkpoint(tmp_path / "checkpoints" / "older.ckpt", 10**17)
    with pytest.warns(DamagedCheckpointWarning, match=r"a\.ckpt' is unusable: it has the weights alone"):
        assert continue_last_run(trainer) == str(tmp_path / "checkpoints" / "older.ckpt")


# ---- whose ----


def of_run(path: Path, run: str, age: int = 0) -> Path:
    checkpoint(path)
    torch.save({"state_dict": {}, "optimizer_states": [], RUN_KEY: run}, path)
    os.utime(path, ns=(10**18 - age, 10**18 - age))
    return path


def test_checkpoints_of_another_run_are_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "lightning_logs" / "version_0"
    RunRecord("mine", "saved").write(folder)
    own = of_run(folder / "checkpoints" / "a.ckpt", "mine", age=2)
    of_run(folder / "checkpoints" / "b.ckpt", "other", age=1)
    of_run(tmp_path / "hpc_ckpt_1.ckpt", "other")
    assert continue_last_run(quiet_trainer(tmp_path, enable_checkpointing=True)) == str(own)


def test_the_owner_of_a_folder_of_checkpoints_goes_on(tmp_path: Path) -> None:
    for number, run in enumerate(["mine", "other"]):
        RunRecord(run, "saved").write(tmp_path / "lightning_logs" / f"version_{number}")
    RunRecord("mine", "saved").write(tmp_path / "elsewhere")
    path = of_run(tmp_path / "elsewhere" / "a.ckpt", "mine")
    logger = TensorBoardLogger(tmp_path)
    callbacks = [saver(dirpath=tmp_path / "elsewhere")]
    trainer = quiet_trainer(tmp_path, enable_checkpointing=True, callbacks=callbacks, logger=logger)
    assert continue_last_run(trainer) == str(path)
    assert logger.log_dir == str(tmp_path / "lightning_logs" / "version_0")
    # A new folder is a new run.
    callbacks = [saver(dirpath=tmp_path / "new")]
    trainer = quiet_trainer(
        tmp_path, enable_checkpointing=True, callbacks=callbacks, logger=TensorBoardLogger(tmp_path)
    )
    assert continue_last_run(trainer) is None
    assert trainer.loggers[0].version == 2


# ---- nothing to resume from ----


def nothing(place: Path, holds: str) -> str:
    return (
        f"ckpt_path is 'last', and the last run, in {str(place)!r}, has no checkpoint to resume from (it holds "
        f"{holds}); give the path of a checkpoint, or start over without ckpt_path."
    )


@pytest.mark.parametrize("state", ["begun", "saved", "ended", "untrained", None])
@pytest.mark.parametrize("logger", [True, False])
def test_a_used_folder_without_a_checkpoint_is_loud(tmp_path: Path, state: Any, logger: bool) -> None:
    folder = tmp_path / "lightning_logs" / "version_0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    (folder / "metrics.csv").write_text("")
    if state is not None:
        RunRecord("mine", state).write(folder)
    trainer = quiet_trainer(tmp_path, enable_checkpointing=True, logger=CSVLogger(tmp_path) if logger else False)
    if state in ("begun", "untrained"):
        assert continue_last_run(trainer) is None
        return
    with pytest.raises(CheckpointError) as caught:
        continue_last_run(trainer)
    assert str(caught.value) == nothing(folder, "config.yaml, metrics.csv")


def test_other_used_folders_without_a_checkpoint(tmp_path: Path) -> None:
    named = tmp_path / "elsewhere"
    trainer = quiet_trainer(tmp_path, enable_checkpointing=True, callbacks=[saver(dirpath=named)])
    assert continue_last_run(trainer) is None
    named.mkdir()
    for number in range(7):
        (named / f"{number}.bin").write_text("")
    with pytest.raises(CheckpointError) as caught:
        continue_last_run(trainer)
    assert str(caught.value) == nothing(named, "0.bin, 1.bin, 2.bin, 3.bin, 4.bin, ...")
    version = tmp_path / "lightning_logs" / "mine"
    given = quiet_trainer(tmp_path, enable_checkpointing=True, logger=CSVLogger(tmp_path, version="mine"))
    assert continue_last_run(given) is None
    (version / "adapter").mkdir(parents=True)
    with pytest.raises(CheckpointError) as caught:
        continue_last_run(given)
    assert str(caught.value) == nothing(version, "adapter")
    # A kill in the middle of the first checkpoint leaves this.
    shutil.rmtree(version / "adapter")
    (version / "checkpoints").mkdir()
    (version / "checkpoints" / ".a.ckpt.partial").write_text("")
    assert continue_last_run(given) is None
