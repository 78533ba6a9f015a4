"""Where results are: a JSON for each cell that ran, in a cache, and one packed file.

It is ``cells.jsonl.gz`` with a line for each cell, in order of setting and name. ``pack`` moves cells from the cache
into it.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from benchmarks.study import StudyError

PACKED = Path(__file__).parents[1] / "results"
CELLS = Path(".cache/study/cells")
_FILE = "cells.jsonl.gz"
Result = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """Results, packed or not. None of them is to be changed: they are read once.

    Attributes:
        packed: Folder of the packed file.
        cells: Folder that cells are written to, ``SETTING/ARM/rateR-seedS.json``.
    """

    packed: Path = PACKED
    cells: Path = CELLS

    def path_of(self, name: str) -> Path:
        """Where the cell of a name is written to."""
        # with_suffix would take what follows the point of a learning rate for a suffix.
        return self.cells / f"{name}.json"

    def get(self, name: str) -> Result | None:
        """The result of the cell of a name, or None."""
        file = self.path_of(name)
        if file.is_file():
            return read(file)
        return self._packed().get(name)

    def _packed(self) -> Mapping[str, Result]:
        file = self.packed / _FILE
        if not file.is_file():
            return {}
        stamp = file.stat()
        return _unpacked(file, stamp.st_mtime_ns, stamp.st_size)

    def all_packed(self) -> list[Result]:
        """All packed results, in order of setting and name.

        Raises:
            StudyError: The packed file cannot be read.
        """
        return list(self._packed().values())

    def all(self) -> list[Result]:
        """All results, packed or not, in order of name."""
        by_name = {name_of(result): result for result in self.all_packed()}
        by_name |= {name_of(result): result for result in map(read, self._files())}
        return [by_name[name] for name in sorted(by_name)]

    def write(self, result: Result) -> None:
        """Writes the result of a cell into the cache, whole or not at all."""
        _replace(self.path_of(name_of(result)), _line(result).encode())

    def pack(self) -> dict[str, int]:
        """Moves all cells of the cache into the packed file.

        Returns:
            How many cells each setting gained.
        """
        self.cells.mkdir(parents=True, exist_ok=True)
        with FileLock(self.cells / "pack.lock"):
            found = {file: read(file) for file in self._files()}
            if found:
                lines = {**self._packed(), **{name_of(result): result for result in found.values()}}
                text = "".join(_line(lines[name]) for name in sorted(lines, key=lambda name: name.split("/")))
                _replace(self.packed / _FILE, gzip.compress(text.encode(), mtime=0))
            for file in found:
                file.unlink()
        return dict(sorted(Counter(name_of(result).partition("/")[0] for result in found.values()).items()))

    def _files(self) -> list[Path]:
        return sorted(self.cells.rglob("*.json"))


def name_of(result: Result) -> str:
    """The name of a result's cell."""
    return str(result["run_info"]["experiment_name"])


def _line(result: Result) -> str:
    return json.dumps(result, allow_nan=False) + "\n"


def _replace(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(file)


def _checked(result: Any) -> Result:
    result["study_info"]["fingerprint"], result["run_info"]["experiment_name"], result["train_info"]["metrics"]
    return dict(result)


def read(file: Path) -> Result:
    """Reads a cell's own file.

    Raises:
        StudyError: It is none.
    """
    try:
        return _checked(json.loads(file.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(
            f"{str(file)!r} is no result of a cell ({type(error).__name__}); remove it, and the cell runs again."
        ) from error


@lru_cache(maxsize=8)
def _unpacked(file: Path, *stamp: int) -> Mapping[str, Result]:
    try:
        lines = gzip.decompress(file.read_bytes()).decode().splitlines()
        return {name_of(result): result for result in map(_checked, map(json.loads, lines))}
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        raise StudyError(
            f"{str(file)!r} holds no packed results ({type(error).__name__}); take it from the repository again."
        ) from error
