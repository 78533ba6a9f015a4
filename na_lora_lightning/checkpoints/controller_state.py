"""The state of both mechanisms in a file of its own, beside a checkpoint that tells which state belongs to it."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STATE_FILE = "na_lora_state.pt"


def save_state(state: Mapping[str, Any], folder: Path) -> None:
    """Writes a state into a folder, whole or not at all."""
    partial = folder / f".{STATE_FILE}.partial"
    torch.save(state, partial)
    partial.replace(folder / STATE_FILE)


def find_state(folders: Iterable[Path], wanted: str | None) -> dict[str, Any] | None:
    """The first intact state in the folders that has the :func:`fingerprint` wanted; None where there is none."""
    for folder in folders:
        state = _read(folder / STATE_FILE)
        if state is not None and fingerprint(state) == wanted:
            return state
    return None


def fingerprint(state: Mapping[str, Any]) -> str:
    """Tells states apart: a hash of all names and values."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            for name in sorted(value):
                found.update(name.encode())
                add(value[name])
        elif isinstance(value, Tensor):
            found.update(value.detach().cpu().contiguous().numpy().tobytes())
        else:
            found.update(repr(value).encode())

    add(state)
    return found.hexdigest()


def _read(file: Path) -> dict[str, Any] | None:
    try:
        saved: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError):
        return None
    return saved
