from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_models import ForeignModule, loader, lora_state, make_trainer

from na_lora_lightning.checkpoints import files as checkpointing
from na_lora_lightning.checkpoints.callbacks import RunCheckpoint
from na_lora_lightning.checkpoints.files import (
    AtomicCheckpointIO,
    CheckpointNotWrittenWarning,
    damage,
    newest_first,
    newest_intact,
    replace_file,
)
from na_lora_lightning.errors import CheckpointError, ConfigurationError

CONTENT = {"weights": torch.arange(2000.0), "step": 3, "state_dict": {}, "optimizer_states": []}


def saved(path: Path, age: int = 0) -> Path:
    torch.save(CONTENT, path)
    os.utime(path, ns=(10**18 - age, 10**18 - age))
    return path


@pytest.mark.parametrize("kept", [0, 1, 100, 5000, -30, -1])
def test_truncated_files_are_damaged(tmp_path: Path, kept: int) -> None:
    path = saved(tmp_path / "a.ckpt")
    assert damage(path) is None
    path.write_bytes(path.read_bytes()[:kept])
    assert damage(path) == ("it is empty" if kept == 0 else "it is incomplete")


def test_one_changed_bit_is_damage_though_torch_loads_it(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt")
    content = bytearray(path.read_bytes())
    content[content.find(CONTENT["weights"][1000:].numpy().tobytes()[:64])] ^= 1  # type: ignore[index]
    path.write_bytes(content)
    assert not torch.equal(torch.load(path)["weights"], CONTENT["weights"])  # type: ignore[arg-type]
    assert damage(path) == "the checksum of 'a/data/0' in it is wrong"


def test_the_newest_intact_file(tmp_path: Path) -> None:
    newest, middle, oldest = (saved(tmp_path / f"{name}.ckpt", age) for age, name in enumerate("nmo"))
    newest.write_bytes(b"PK")
    os.utime(newest, ns=(10**18, 10**18))
    paths = [oldest, newest, middle, tmp_path / "missing.ckpt"]
    assert newest_first(paths) == [newest, middle, oldest]
    assert newest_intact(paths) == (middle, {newest: "damaged: it is incomplete"})
    assert newest_intact([newest]) == (None, {newest: "damaged: it is incomplete"})


def test_a_checkpoint_is_written_loaded_and_removed(tmp_path: Path) -> None:
    plugin, path = AtomicCheckpointIO(), tmp_path / "new" / "a.ckpt"
    plugin.save_checkpoint(CONTENT, path)
    assert [file.name for file in path.parent.iterdir()] == ["a.ckpt"]
    assert torch.equal(plugin.load_checkpoint(path)["weights"], CONTENT["weights"])  # type: ignore[arg-type]
    plugin.remove_checkpoint(path)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"former")

    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if fails == "write":
        # A folder in the place of the partial file fails as it is opened.
        (tmp_path / ".a.ckpt.partial").mkdir()
        with pytest.raises(OSError, match="directory"):
            replace_file(path, b"new")
        (tmp_path / ".a.ckpt.partial").rmdir()
    else:
        monkeypatch.setattr(*((os, "fsync", fail) if fails == "fsync" else (Path, "replace", fail)))
        with pytest.raises(OSError, match="No space"):
            replace_file(path, b"new")
    assert path.read_bytes() == b"former"
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_damaged_checkpoint_is_refused_and_the_one_before_named(tmp_path: Path) -> None:
    before, path = saved(tmp_path / "before.ckpt", age=1), saved(tmp_path / "a.ckpt")
    path.write_bytes(path.read_bytes()[:500])
    plugin = AtomicCheckpointIO()
    with pytest.raises(CheckpointError, match=r"a\.ckpt' is damaged: it is incomplete; resume from '.*before\.ckpt'"):
        plugin.load_checkpoint(path)
    before.unlink()
    with pytest.raises(CheckpointError, match="there is no intact one beside it, so training has to start over"):
        plugin.load_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"before\.ckpt' does not exist"):
        plugin.load_checkpoint(before)


def test_objects_that_could_run_code_are_not_loaded(tmp_path: Path) -> None:
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "a.ckpt")
    plugin = AtomicCheckpointIO()
    with pytest.raises(CheckpointError, match="objects other than tensors and plain values"):
        plugin.load_checkpoint(tmp_path / "a.ckpt")
    assert plugin.load_checkpoint(tmp_path / "a.ckpt", weights_only=False)["model"].in_features == 1


def fail_at(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Lets some of the coming checkpoints fall on a full disk."""
    original, calls = checkpointing.replace_file, 0

    def write(path: Path, content: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in numbers:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, content)

    monkeypatch.setattr(checkpointing, "replace_file", write)


def test_a_full_disk_costs_no_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, 2, 3)
    seen: list[list[str]] = []

    class Saver(ModelCheckpoint):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *arguments)
            seen.append(sorted(path.name for path in Path(str(self.dirpath)).iterdir()))

    saver = Saver(tmp_path / "c", filename="{step}", every_n_train_steps=1)
    module = ForeignModule()
    trainer = make_trainer(
        tmp_path, max_epochs=1, enable_checkpointing=True, callbacks=[saver], plugins=[AtomicCheckpointIO()]
    )
    with pytest.warns(CheckpointNotWrittenWarning, match=r"step=[23]\.ckpt' could not be written \(No space left"):
        trainer.fit(module, loader(4))
    assert seen == [["step=1.ckpt"], ["step=1.ckpt"], ["step=1.ckpt"], ["step=4.ckpt"]]
    assert len(module.losses) == 4


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize(
    ("accumulated", "every", "expected"),
    [(1, 2, [2, 4, 5, 6, 8, 10]), (2, 2, [2, 3, 4, 6]), (1, 0, [5, 10]), (3, 1, [1, 2, 3, 4])],
)
def test_run_checkpoint_saves_between_steps_and_after_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int, accumulated: int, every: int, expected: list[int]
) -> None:
    steps: list[int] = []
    original = Trainer.save_checkpoint
    monkeypatch.setattr(
        Trainer, "save_checkpoint", lambda self, *a, **k: (steps.append(self.global_step), original(self, *a, **k))[1]
    )
    saver = RunCheckpoint(every_n_steps=every, keep=keep, dirpath=str(tmp_path / "c"))
    make_trainer(
        tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[saver], accumulate_grad_batches=accumulated
    ).fit(ForeignModule(), loader(5))
    assert steps == expected
    kept = sorted(int(path.stem.split("step=")[1]) for path in (tmp_path / "c").iterdir())
    assert kept == expected[-keep:]


def test_run_checkpoint_in_a_foreign_project_resumes_exactly(tmp_path: Path) -> None:
    def fit(**options: Any) -> ForeignModule:
        module = ForeignModule()
        saver = RunCheckpoint(every_n_steps=3, keep=9, dirpath=str(tmp_path / "c"))
        plugins = [AtomicCheckpointIO()]
        trainer = make_trainer(tmp_path, enable_checkpointing=True, callbacks=[saver], plugins=plugins)
        trainer.fit(module, loader(4), **options)
        return module

    whole = lora_state(fit())
    # At the end of the first of two epochs; a plain loader does not resume within one.
    with pytest.warns(UserWarning, match="exists and is not empty"):
        resumed = lora_state(fit(ckpt_path=tmp_path / "c" / "epoch=0-step=4.ckpt"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_run_checkpoint_refuses_what_cannot_work() -> None:
    with pytest.raises(ConfigurationError, match="every_n_steps is -1"):
        RunCheckpoint(every_n_steps=-1)
    with pytest.raises(ConfigurationError, match="keep is 0, so no checkpoint would be left"):
        RunCheckpoint(keep=0)
