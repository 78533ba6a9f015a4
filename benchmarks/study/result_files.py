"""Result files: one JSON for each cell, in the schema of PEFT's method comparison.

``run_info``, ``train_info`` and ``meta_info`` have that schema's keys (``accelerator_memory_*`` are resident memory on
a CPU). ``study_info`` adds what this study needs: fingerprint, arm, digests of model and data, probes.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.study import tasks
from benchmarks.study.errors import StudyError
from benchmarks.study.specification import Cell

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "transformers", "peft", "tokenizers", "numpy")
_FINISHED = ("success", "diverged")


@lru_cache
def _system() -> dict[str, Any]:
    has_gpu = torch.cuda.is_available()
    processor = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "processor": processor,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(0) if has_gpu else "none",
        "python": platform.python_version(),
    }


def _lines(path: str) -> Iterator[str]:
    try:
        yield from Path(path).read_text().splitlines()
    except OSError:
        return


@lru_cache
def _package_commit() -> str | None:
    """Commit of this project, read from its ``.git`` folder."""
    root = Path(__file__).parents[2] / ".git"
    try:
        head = (root / "HEAD").read_text().strip()
        return (root / head[5:]).read_text().strip() if head.startswith("ref: ") else head
    except OSError:
        return None


def without_infinities(value: Any) -> Any:
    """Plain values with numbers that JSON lacks replaced by None, and sets by sorted lists."""
    if isinstance(value, dict):
        return {str(key): without_infinities(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [without_infinities(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def make_result(cell: Cell, ran: dict[str, Any], total_seconds: float) -> dict[str, Any]:
    """The JSON of a cell.

    Args:
        cell: The cell.
        ran: What :func:`benchmarks.study.training.run_cell` returned.
        total_seconds: Wall time of all of it.
    """
    packages = {f"{name}-version": version(name) for name in _PACKAGES}
    memory = ran["memory"] or [0]
    result = {
        "run_info": {
            "created_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "total_time": total_seconds,
            "experiment_name": cell.name,
            "train_config": cell.config(),
            "peft_config": ran["peft_config"],
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": int(np.mean(memory)),
            "accelerator_memory_max": int(max(memory)),
            "accelerator_memory_reserved_99th": int(np.percentile(memory, 99)),
            "train_time": ran["train_seconds"],
            "file_size": ran["adapter_bytes"],
            "num_trainable_params": ran["trainable"],
            "num_total_params": ran["total"],
            "status": ran["status"],
            "metrics": ran["metrics"],
        },
        "meta_info": {
            "model_info": {"sha": ran["model_sha256"]},
            "dataset_info": {cell.setting.task: {"sha": ran["data_sha256"]}},
            "package_info": packages | tasks.packages_of(cell.setting.data),
            "system_info": _system(),
            "pytorch_info": torch.__config__.show().splitlines()[0] + f"; torch {torch.__version__}",
        },
        "study_info": {
            "fingerprint": cell.fingerprint,
            "project_commit": _package_commit(),
            "options": cell.arm.options_of(cell.seed),
            "gates": ran["gates"],
            "probes": ran["probes"],
        },
    }
    return dict(without_infinities(result))


def path_of(cell: Cell, folder: Path) -> Path:
    """Where a cell's result is."""
    # with_suffix would take what follows the point of a learning rate for a suffix.
    return folder / f"{cell.name}.json"


def is_done(cell: Cell, folder: Path) -> bool:
    """Whether the cell has a result.

    Raises:
        StudyError: Its file holds another cell, because an option was changed since.
    """
    file = path_of(cell, folder)
    if not file.is_file():
        return False
    saved = read(file)
    if saved["study_info"]["fingerprint"] != cell.fingerprint:
        raise StudyError(
            f"{str(file)!r} was made with other options than the study now gives this cell; rename the arm or task, "
            "or remove the file."
        )
    return True


def write(result: dict[str, Any], file: Path) -> None:
    """Writes a result whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(result, allow_nan=False) + "\n")
    partial.replace(file)


def read(file: Path) -> dict[str, Any]:
    """Reads a result.

    Raises:
        StudyError: It is none.
    """
    try:
        result = json.loads(file.read_text())
        result["study_info"]["fingerprint"], result["run_info"], result["train_info"]["metrics"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{str(file)!r} is no result of a cell ({error}); remove it or give another file.") from error
    return dict(result)


def read_all(folder: Path) -> list[dict[str, Any]]:
    """All results below a folder that ended, in order of path."""
    found = [read(file) for file in sorted(folder.rglob("*.json")) if not file.name.startswith(".")]
    return [result for result in found if result["train_info"]["status"] in _FINISHED]


class Claim:
    """A cell that this process works on, so that another process leaves it alone.

    Args:
        file: The result's path.
    """

    def __init__(self, file: Path) -> None:
        self._file = file.with_name(f".{file.name}.claim")

    def take(self) -> bool:
        """Whether the cell is now this process's; one that a dead process left behind is taken over."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            try:
                handle = os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                if self._holder_lives():
                    return False
                self._file.unlink(missing_ok=True)
                continue
            with os.fdopen(handle, "w") as stream:
                stream.write(str(os.getpid()))
            return True
        return False

    def _holder_lives(self) -> bool:
        try:
            holder = int(self._file.read_text())
            os.kill(holder, 0)
        except FileNotFoundError:
            return False
        except ValueError:
            # Made and not yet filled in, unless it has been so for long.
            try:
                return time.time() - self._file.stat().st_mtime < 60
            except FileNotFoundError:
                return False
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def release(self) -> None:
        """Gives the cell back."""
        self._file.unlink(missing_ok=True)
