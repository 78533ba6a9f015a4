"""Stages that are done once: a stage's folder appears complete or not at all, and says what it was made from."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

_MARKER = "stage.json"


def fingerprint(**ingredients: Any) -> str:
    """A short name of everything that a stage depends on.

    Args:
        **ingredients: Values that JSON can hold, or paths.

    Returns:
        The first 16 hexadecimal digits of a SHA-256.
    """
    text = json.dumps(ingredients, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_made(folder: Path, key: str) -> bool:
    """Tell whether a folder holds the result of a stage, made from the same ingredients.

    Args:
        folder: The stage's folder; it need not exist.
        key: What :func:`fingerprint` returned for the ingredients.
    """
    try:
        return json.loads((folder / _MARKER).read_text(encoding="utf-8"))["key"] == key
    except (OSError, ValueError, KeyError):
        return False


def stage(folder: Path, key: str, title: str, make: Callable[[Path], str], say: Callable[[str], None] = print) -> Path:
    """Make the folder of a stage, unless it is there already.

    Args:
        folder: The stage's folder; one that was made from other ingredients is replaced.
        key: What :func:`fingerprint` returned for the ingredients.
        title: Name of the stage, for the user.
        make: Fills an empty folder and returns what is to be said of it.
        say: Takes one line about the stage.

    Returns:
        ``folder``.
    """
    if is_made(folder, key):
        say(f"{title}: {folder} (already there)")
        return folder
    say(f"{title} …")
    started = perf_counter()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as scratch:
        partial = Path(scratch) / folder.name
        partial.mkdir()
        summary = make(partial)
        seconds = perf_counter() - started
        marker = {"key": key, "seconds": round(seconds, 1), "summary": summary}
        (partial / _MARKER).write_text(json.dumps(marker) + "\n", encoding="utf-8")
        if folder.exists():
            # Moved and not removed in place: an interruption leaves no half of it.
            folder.rename(Path(scratch) / "former")
        partial.rename(folder)
    say(f"{title}: {folder} ({summary}, {seconds:.0f} s)")
    return folder


def forget(folder: Path) -> None:
    """Remove what a stage has made, and nothing that a stage has not made.

    Args:
        folder: The stage's folder; it need not exist.
    """
    if (folder / _MARKER).is_file():
        shutil.rmtree(folder)
