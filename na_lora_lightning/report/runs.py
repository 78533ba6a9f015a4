"""What a run left in its folder, in the form in which a page shows it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from na_lora_lightning.errors import DataError
from na_lora_lightning.history import FILE, History, read_history

Array = NDArray[np.floating[Any]]
_CONFIG = "config.yaml"
_MOST_NAMED = 4
# Answers of the same prompts, before and after.
_MOST_SAMPLES = 5


@dataclass
class Run:
    """A run by its folder.

    Attributes:
        folder: Its folder.
        name: A short one, unlike those of the other runs of the page.
        history: What it wrote.
    """

    folder: Path
    name: str
    history: History

    @property
    def labels(self) -> list[str]:
        """Of its gate sites."""
        return [str(site["label"]) for site in self.history.start.get("sites", [])]

    @property
    def channels(self) -> int:
        """Of all gates together."""
        return sum(int(site["channels"]) for site in self.history.start.get("sites", []))

    @property
    def options(self) -> dict[str, Any]:
        """Its hyper-parameters."""
        return dict(self.history.start.get("options", {}))

    @property
    def in_force(self) -> str:
        """What was in force of the method, in one sentence."""
        return str(self.history.start.get("in_force", "It is not known what was in force."))

    @cached_property
    def state(self) -> str:
        """How far it came."""
        step, end = self.history.last_step, self.history.end
        if end is not None:
            return f"{end.get('outcome', 'ended')} at step {step:,}"
        planned = self.history.start.get("planned_steps")
        of = f" of {planned:,}" if isinstance(planned, int) else ""
        heard = self.history.last_time
        ago = "" if heard is None else f", last heard of {_duration(max(0.0, time.time() - heard))} before this page"
        return f"at step {step:,}{of}: going on, or stopped without a word{ago}"

    @property
    def resumes(self) -> int:
        """How often it went on after an interruption."""
        return max(0, len(self.history.starts) - 1)

    @property
    def seconds_per_step(self) -> float | None:
        """The median, between logged steps."""
        known = [(entry["step"], entry["time"]) for entry in self.history.steps if "time" in entry]
        pace = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(known) if b[0] > a[0]]
        return float(np.median(pace)) if pace else None

    @property
    def before(self) -> dict[str, Any] | None:
        """The validation before the first step."""
        first = self.history.validations[0] if self.history.validations else None
        return first if first is not None and first["step"] == 0 else None

    @property
    def after(self) -> dict[str, Any] | None:
        """The last validation after a step."""
        last = self.history.validations[-1] if self.history.validations else None
        return last if last is not None and last["step"] > 0 else None

    def series(self, name: str, kind: str = "steps") -> tuple[list[int], list[float]]:
        """A metric over steps.

        Args:
            name: Its name.
            kind: ``"steps"`` of training, or ``"validations"``.
        """
        entries: Sequence[Mapping[str, Any]] = getattr(self.history, kind)
        found = [
            (entry["step"], value)
            for entry in entries
            if isinstance(value := entry.get("metrics", {}).get(name), (int, float))
        ]
        return [step for step, _ in found], [value for _, value in found]

    def metric_names(self, kind: str = "steps") -> list[str]:
        """Metrics that were written, in the order in which they came up."""
        entries: Sequence[Mapping[str, Any]] = getattr(self.history, kind)
        return list(dict.fromkeys(name for entry in entries for name in entry.get("metrics", {})))

    def gates(self, group: str) -> tuple[list[int], Array]:
        """A group of curves over steps.

        Returns:
            The steps, and ``[sites, steps]``, NaN where nothing was measured.
        """
        known = self._gates.get(group)
        return ([], np.empty((len(self.labels), 0))) if known is None else known

    @cached_property
    def _gates(self) -> dict[str, tuple[list[int], Array]]:
        found: dict[str, tuple[list[int], list[Any]]] = {}
        count = len(self.labels)
        for entry in self.history.steps:
            for group, values in (entry.get("gates") or {}).items():
                if isinstance(values, list) and len(values) == count:
                    steps, rows = found.setdefault(group, ([], []))
                    steps.append(entry["step"])
                    rows.append(values)
        return {
            group: (steps, np.array(rows, dtype=float).reshape(len(rows), count).T)
            for group, (steps, rows) in found.items()
        }

    def last(self, group: str) -> Array:
        """The mean of the last tenth of what was measured, ``[sites]``; NaN for what was not."""
        steps, values = self.gates(group)
        if not steps:
            return np.full(len(self.labels), np.nan)
        tail = values[:, -max(1, len(steps) // 10) :]
        known = np.isfinite(tail)
        sums = np.where(known, tail, 0.0).sum(axis=1)
        return np.where(known.any(axis=1), sums / np.maximum(known.sum(axis=1), 1), np.nan)

    @property
    def quiet(self) -> dict[str, int]:
        """Channels that have not responded, by layer; without those where all did."""
        counts = (self.history.channels or {}).get("quiet", [])
        return {label: int(count) for label, count in zip(self.labels, counts, strict=False) if count}

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Prompts with their references, and the answers before and after."""
        first, last = ((entry or {}).get("samples") or [] for entry in (self.before, self.after))
        answers = {(sample["prompt"], sample["reference"]): sample for sample in first}
        rows = last or first
        return [
            {
                "prompt": sample["prompt"],
                "reference": sample["reference"],
                "before": _answer(answers.get((sample["prompt"], sample["reference"]))),
                "after": _answer(sample if last else None),
            }
            for sample in rows[:_MOST_SAMPLES]
        ]

    @property
    def config(self) -> str | None:
        """The configuration that na-lora fit wrote."""
        try:
            return (self.folder / _CONFIG).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    @property
    def command(self) -> str | None:
        """What runs it again."""
        path = str(self.folder / _CONFIG)
        quoted = path if all(letter.isalnum() or letter in "/._-" for letter in path) else json.dumps(path)
        return None if self.config is None else f"na-lora fit --config {quoted}"


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Reads runs.

    Args:
        folders: Their folders.

    Raises:
        DataError: One is not the folder of a run.
    """
    paths = list(dict.fromkeys(Path(folder).expanduser() for folder in folders))
    names = _names(paths)
    return [Run(path, name, _history(path)) for path, name in zip(paths, names, strict=True)]


def _answer(sample: Mapping[str, Any] | None) -> dict[str, Any]:
    """An answer, and whether the right one is in it."""
    if sample is None:
        return {"text": "", "right": False}
    return {"text": sample["answer"], "right": bool(sample.get("correct") or sample.get("found"))}


def _history(folder: Path) -> History:
    if not folder.is_dir():
        raise DataError(f"there is no folder {str(folder)!r}; give the folder of a run, such as runs/version_0.")
    history = read_history(folder)
    if history is not None and history.starts:
        return history
    below = sorted(str(path.parent) for path in folder.glob(f"*/{FILE}")) or sorted(
        str(path.parent) for path in folder.glob(f"*/*/{FILE}")
    )
    more = f", and {len(below) - _MOST_NAMED} more" if len(below) > _MOST_NAMED else ""
    advice = (
        f"give {', '.join(below[:_MOST_NAMED])}{more}" if below else "give the folder in which a fit has written one"
    )
    what = f"holds no {FILE}" if history is None else f"holds a {FILE} in which no fit begins"
    raise DataError(f"the folder {str(folder)!r} {what}, so there is no run to report; {advice}.")


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of paths, as many as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            # A number alone says little.
            return ["/".join(each[-max(count, 2) :]) for each in parts]
    return [str(path) for path in paths]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"
