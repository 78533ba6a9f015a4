"""What a run leaves in its folders to be known again, and the hold that it has on them while it trains."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from na_lora_lightning.checkpoints.files import RUN_FILE
from na_lora_lightning.errors import ConfigurationError

try:
    import fcntl
except ImportError:  # There are no such locks on this system.
    fcntl = None  # type: ignore[assignment]

_LOCK_FILE = ".na_lora_lock"


@dataclass
class RunRecord:
    """Which run a folder belongs to.

    Attributes:
        run: A name that no other run has.
        state: How far it has come: ``begun``, ``saved`` its first checkpoint, or ``ended``; ``untrained`` where there
            was an evaluation alone, or a fit that failed before its first step.
        loggers: Class and version of each logger, in the trainer's order.
    """

    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    state: Literal["begun", "saved", "ended", "untrained"] = "begun"
    loggers: list[tuple[str, Any]] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Leaves the record in a folder, which is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{RUN_FILE}.partial"
        partial.write_text(json.dumps(asdict(self), default=str), encoding="utf-8")
        partial.replace(folder / RUN_FILE)


def read_record(folder: Path) -> RunRecord | None:
    """The record in a folder, if there is one."""
    try:
        content = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        record = RunRecord(str(content["run"]), content["state"], [tuple(entry) for entry in content["loggers"]])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record


class Hold:
    """A lock that the system takes back when the process ends, however that happens.

    Args:
        path: The file that stands for what is held; it is gone after :meth:`release`.
        held: What it is, for the error.

    Raises:
        ConfigurationError: Another process has it.
    """

    def __init__(self, path: Path, held: str) -> None:
        self.path = path
        self._descriptor: int | None = None
        if fcntl is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                # Unlike flock's, these locks do not pass to processes that load data, which may outlive a killed run.
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if isinstance(error, (BlockingIOError, PermissionError)):
                    raise ConfigurationError(
                        f"{held} is in use by another fit that runs now; wait until it ends, or give this one another."
                    ) from error
                # A file system without locks.
                return
            if _is_file(descriptor, path):
                self._descriptor = descriptor
                return
            # Removed by the one that had it.
            os.close(descriptor)

    def release(self) -> None:
        """Gives it back."""
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


def hold_folder(folder: Path) -> Hold:
    """Holds a folder that a run writes to, by a file in it."""
    return Hold(folder / _LOCK_FILE, f"the folder {str(folder)!r}")


def hold_adapter(folder: Path) -> Hold:
    """Holds the folder of an adapter, by a file beside it, as it is made in one step."""
    return Hold(folder.with_name(f".{folder.name}.lock"), f"the adapter folder {str(folder)!r}")


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False
