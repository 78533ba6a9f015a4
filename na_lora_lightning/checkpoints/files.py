"""Checkpoint files that survive what happens to machines: kills, full disks, damage.

:class:`AtomicCheckpointIO` is a plugin for any trainer, ``Trainer(plugins=[AtomicCheckpointIO()])``; ``na-lora`` uses
it by itself. Files at remote addresses are left to Lightning.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from na_lora_lightning.errors import CheckpointError

SUFFIX = ".ckpt"
# Marks the folder of a run.
RUN_FILE = ".na_lora_run"
# Where a checkpoint says of which run it is.
RUN_KEY = "na_lora_lightning_run"


class CheckpointNotWrittenWarning(UserWarning):
    """A checkpoint could not be written, and training goes on without it."""


def checkpoints_below(folder: Path, suffixes: Collection[str] = (SUFFIX,)) -> list[Path]:
    """Finds checkpoints in a folder and those below it, into which a slash in their names puts them.

    Args:
        folder: Where to look; it need not exist.
        suffixes: How their names end.

    Returns:
        Files, and folders of checkpoints that are folders; a link beside what it leads to is left out.
    """
    found: list[Path] = []
    for place, folders, files in os.walk(folder):
        named = {name for name in (*folders, *files) if name.endswith(tuple(suffixes)) and not name.startswith(".")}
        found += [Path(place) / name for name in named]
        # Neither hidden folders nor those of other runs.
        folders[:] = [
            name
            for name in folders
            if name not in named and not name.startswith(".") and not Path(place, name, RUN_FILE).exists()
        ]
    originals = {path.resolve() for path in found if not path.is_symlink()}
    return [path for path in found if path.exists() and not (path.is_symlink() and path.resolve() in originals)]


def damage(path: str | Path) -> str | None:
    """Reads a checkpoint in full and says what is wrong with it.

    Truncation shows in the archive's directory, which is at the end of the file, and changed bytes show in its
    checksums, which ``torch.load`` does not look at. Of a checkpoint that is a folder, whose parts several processes
    write, the file that is written last is looked for.

    Args:
        path: A local file that ``torch.save`` wrote, or a folder that a sharding strategy did.

    Returns:
        A few words, or None for an intact file.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "meta.pt").is_file():
            return damage(path / "meta.pt") if (path / ".metadata").is_file() else "it is incomplete"
        return None if (path / "checkpoint").is_dir() else "it is incomplete"
    try:
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip()
    except (zipfile.BadZipFile, EOFError, ValueError):
        return "it is incomplete" if path.stat().st_size else "it is empty"
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    return None if changed is None else f"the checksum of {changed!r} in it is wrong"


def describe_content(path: Path) -> tuple[str | None, str | None]:
    """Looks into an intact checkpoint, without its tensors.

    Args:
        path: As for :func:`damage`.

    Returns:
        Why training cannot resume from it, or None; and the run that it says it is of, or None.
    """
    if path.is_dir():
        return None, None
    try:
        content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError):
        # Whoever loads it says what is wrong.
        return None, None
    if not isinstance(content, dict) or "state_dict" not in content:
        return "it was not written by a trainer", None
    if "optimizer_states" not in content:
        return "it has the weights alone (save_weights_only), and not the state of training", None
    return None, content.get(RUN_KEY)


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Sorts the checkpoints among ``paths`` by the time of their last change, the newest first."""
    times = {path: _changed(path) for path in paths if path.exists()}
    return sorted(times, key=lambda path: (times[path], path.name), reverse=True)


def newest_intact(
    paths: Iterable[Path], run: str | None = None, trains: bool = True
) -> tuple[Path | None, dict[Path, str]]:
    """Finds the checkpoint to resume from.

    Args:
        paths: Checkpoints.
        run: Whose they are to be; those that do not say are taken too.
        trains: Whether they need the state of training.

    Returns:
        The newest intact one, or None, and what is wrong with each newer one.
    """
    unusable: dict[Path, str] = {}
    for path in newest_first(paths):
        found = damage(path)
        if found is not None:
            unusable[path] = f"damaged: {found}"
            continue
        reason, owner = describe_content(path)
        if reason is not None and trains:
            unusable[path] = f"unusable: {reason}"
        elif run is None or owner is None or owner == run:
            return path, unusable
    return None, unusable


def _changed(path: Path) -> int:
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    return max(file.stat().st_mtime_ns for file in files)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, and refuses damaged ones by name.

    A file is written beside its place under the name ``.<name>.partial``, brought to the disk, and then put into its
    place in one step, so that a kill or a power failure at any moment leaves the former file, or the new one.
    (Lightning's own plugin writes to the temporary folder of the machine, from where a file system of its own is copied
    to, which takes more than one step.) Where writing fails, as on a full disk, training goes on with a
    :class:`CheckpointNotWrittenWarning`, and no older checkpoint is removed until one can be written again. Loading
    checks the whole file first.
    """

    def __init__(self) -> None:
        # Removals that wait for a checkpoint that makes up for them.
        self._awaiting: list[str | Path] = []
        self._last_failed = False

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint.

        Args:
            checkpoint: Content.
            path: Where to.
            storage_options: Not used.
        """
        local = _local(path)
        if local is None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            local.parent.mkdir(parents=True, exist_ok=True)
            replace_file(local, content.getbuffer())
        except OSError as error:
            self._last_failed = True
            rank_zero_warn(
                f"the checkpoint {str(local)!r} could not be written ({error.strerror or error}), and training goes "
                "on without it; make room, as the checkpoints before it are kept until one can be written.",
                category=CheckpointNotWrittenWarning,
            )
            return
        self._last_failed = False
        waiting, self._awaiting = self._awaiting, []
        for former in waiting:
            if _local(former) != local:
                super().remove_checkpoint(former)

    @override
    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None) -> Any:
        """Loads a checkpoint.

        Args:
            path: The file.
            map_location: As for ``torch.load``.
            weights_only: As for ``torch.load``, whose default, True, lets no code in.

        Raises:
            CheckpointError: The file is missing or damaged, or no checkpoint; names the newest intact one beside it.
        """
        local = _local(path)
        if local is not None and not local.is_dir():
            if not local.exists():
                raise CheckpointError(f"the checkpoint {str(local)!r} does not exist; correct its path.")
            found = damage(local)
            if found is not None:
                raise CheckpointError(f"the checkpoint {str(local)!r} is damaged: {found}; {_remedy(local)}.")
        try:
            return super().load_checkpoint(path, map_location, weights_only)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"the checkpoint {str(path)!r} holds objects other than tensors and plain values, which may run code "
                "when they are loaded; load it with weights_only=False if you trust who wrote it."
            ) from error

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a checkpoint, later if the one that takes its place could not be written."""
        if self._last_failed:
            self._awaiting.append(path)
        else:
            super().remove_checkpoint(path)


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Writes a file so that at any moment there is the former one or the whole new one.

    Raises:
        OSError: It cannot be written; the former one is left, and nothing besides.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            # A rename may reach the disk before the content does.
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk, where the system can do that."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _local(path: str | Path) -> Path | None:
    file_system, name = url_to_fs(str(path))
    return Path(name) if isinstance(file_system, LocalFileSystem) else None


def _remedy(path: Path) -> str:
    intact, _ = newest_intact(other for other in checkpoints_below(path.parent) if other != path)
    if intact is None:
        return "there is no intact one beside it, so training has to start over"
    return f"resume from {str(intact)!r}, the newest intact one beside it"
