"""What a cell leaves: a result in the schema of PEFT's method comparison.

``run_info``, ``train_info`` and ``meta_info`` have that schema's keys (``accelerator_memory_*`` are resident memory on
a CPU). ``study_info`` adds what this study needs: fingerprint, arm, digests of model and data, probes.
"""

from __future__ import annotations

import datetime
import math
import platform
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.study.run.specification import Cell
from benchmarks.study.tasks.sources import packages_of

_PACKAGES = ("torch", "transformers", "peft", "tokenizers", "numpy")


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
    root = Path(__file__).parents[3] / ".git"
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
    """The result of a cell.

    Args:
        cell: The cell.
        ran: What :func:`benchmarks.study.run.training.run_cell` returned.
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
            "package_info": packages | packages_of(cell.setting.data),
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
