"""What a run leaves of its course: ``history.jsonl`` in its folder, a JSON object on each line.

Lines are appended, each by one write, so that the file can be read at any time: a last line that was torn by a kill is
left out, and a run that resumes goes on below. ``type`` says what a line is:

- ``start``: a fit begins or resumes after ``step`` optimizer steps. Earlier lines of later steps count no longer.
- ``step``: ``gates`` by group, a value for each site of the ``start``; ``metrics`` by name.
- ``validation``: ``metrics``, and ``samples``, answers to the same first prompts each time.
- ``channels``: by site, how many of its channels have not responded since ``since``.
- ``end``: the fit is over, and how.

``step`` is the number of optimizer steps taken, and ``time`` is in seconds since 1970.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "history.jsonl"
# Enough for pictures and tables.
_DIGITS = 5


class HistoryWriter:
    """Appends to the history of a run.

    Args:
        folder: The run's, which is made if need be.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / FILE

    def write(self, kind: str, step: int, **content: Any) -> None:
        """Appends a line.

        Args:
            kind: Its ``type``.
            step: Optimizer steps taken.
            content: Plain values; numbers that are not finite become null.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = {"type": kind, "step": step, "time": round(time.time(), 3), **content}
        text = json.dumps(_short(line), ensure_ascii=False, separators=(",", ":"), default=str) + "\n"
        # Surrogates, which no encoding has, may be in what a model wrote.
        data = text.encode("utf-8", "backslashreplace")
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            os.lseek(descriptor, max(0, size - 1), os.SEEK_SET)
            if size and os.read(descriptor, 1) != b"\n":
                # A kill tore the last line.
                data = b"\n" + data
            os.write(descriptor, data)
        finally:
            os.close(descriptor)


@dataclass
class History:
    """What is known of a run.

    Attributes:
        starts: Each time that it began or resumed.
        steps: Of training, in order.
        validations: In order.
        channels: What was last written of them; None where nothing was.
        end: How it ended; None where it is going on or was killed.
    """

    starts: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    channels: dict[str, Any] | None = None
    end: dict[str, Any] | None = None

    @property
    def start(self) -> dict[str, Any]:
        """The last start, or an empty one."""
        return self.starts[-1] if self.starts else {}

    @property
    def last_step(self) -> int:
        """Optimizer steps taken until the last line."""
        ends = [entries[-1]["step"] for entries in (self.starts, self.steps, self.validations) if entries]
        return max([*ends, self.end["step"] if self.end else 0])

    @property
    def last_time(self) -> float | None:
        """When the last line was written."""
        entries = [self.end, *(each[-1] for each in (self.starts, self.steps, self.validations) if each)]
        times = [entry["time"] for entry in entries if entry and isinstance(entry.get("time"), (int, float))]
        return max(times, default=None)


def read_history(folder: str | os.PathLike[str]) -> History | None:
    """Reads the history of a run, also while it is written.

    Args:
        folder: The run's.

    Returns:
        What counts of it: of steps that were taken again after a resume, what was written last. None without a file.
    """
    try:
        content = (Path(folder) / FILE).read_bytes()
    except OSError:
        return None
    found = History()
    by_kind: dict[str, dict[int, dict[str, Any]]] = {"step": {}, "validation": {}}
    for line in content.splitlines():
        entry = _entry(line)
        if entry is None:
            continue
        kind, step = entry["type"], entry["step"]
        if kind == "start":
            found.starts.append(entry)
            found.end = None
            for known in by_kind.values():
                for later in [each for each in known if each > step]:
                    del known[later]
        elif kind in by_kind:
            by_kind[kind][step] = entry
        elif kind == "channels":
            found.channels = entry
        elif kind == "end":
            found.end = entry
    found.steps, found.validations = ([known[step] for step in sorted(known)] for known in by_kind.values())
    return found


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    is_entry = isinstance(entry, dict) and isinstance(entry.get("step"), int) and isinstance(entry.get("type"), str)
    return entry if is_entry else None


def _short(value: Any) -> Any:
    """Numbers to the digits that anybody looks at."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) and abs(value) < 1e6 else _whole(value)
    if isinstance(value, Mapping):
        return {str(name): _short(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(each) for each in value]
    return value


def _whole(value: float) -> float | None:
    return value if math.isfinite(value) else None
