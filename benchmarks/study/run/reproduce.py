"""Runs a cell again from its record and compares every number that training decides.

Bit by bit on the processor and packages of the record. Other processors have other kernels, which add in another order,
so that elsewhere the same result has other last bits: losses then agree to four to seven digits.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.study import StudyError
from benchmarks.study.cells import Cell
from benchmarks.study.run.training import run_cell
from benchmarks.study.tasks.sources import packages_of

_PACKAGES = ("torch", "transformers", "peft", "tokenizers", "numpy")
_TIMES = ("train time", "eval time", "tokens / sec")
# What another order of additions may change: seen were 6e-5 of a loss on held-out text after 200 steps (1e-7 at low
# learning rates), and 6e-3 of a probe, where two channels at the border between tenths changed places.
_ROUNDING = 1e-4
_ROUNDING_OF_PROBES = 1e-2


@dataclass(frozen=True)
class Reproduction:
    """How a cell that ran again compares with its result.

    Attributes:
        other_bits: Every number that is not the same bit for bit, one line each.
        other_results: Those of them that differ by more than rounding.
        made_on: Processor of the record, with the packages whose versions differ.
        run_on: The same of this run.
    """

    other_bits: tuple[str, ...]
    other_results: tuple[str, ...]
    made_on: str
    run_on: str

    def lines(self) -> list[str]:
        """What to tell."""
        if not self.other_bits:
            return ["equal, bit by bit"]
        if self.made_on == self.run_on:
            where = f"both ran on {self.run_on}"
        else:
            where = f"the result was made on {self.made_on}, and this is {self.run_on}"
        if self.other_results:
            return [*self.other_results, f"another result: {where}"]
        return [
            f"the same result to {-round(math.log10(_ROUNDING))} digits, but not bit by bit ({len(self.other_bits)} "
            f"numbers): {where}; only the same processor and packages give the same bits"
        ]


def decided(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without those that a clock decides."""
    return [{name: value for name, value in entry.items() if name not in _TIMES} for entry in metrics]


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every number in nested lists and dictionaries, with its place; None for those that JSON lacks."""
    if isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(entry, f"{name} {key}".lstrip())
    else:
        yield name, None if isinstance(value, float) and not math.isfinite(value) else value


def _close(then: Any, now: Any, tolerance: float) -> bool:
    if isinstance(then, float) and isinstance(now, float):
        return math.isclose(then, now, rel_tol=tolerance, abs_tol=tolerance * tolerance)
    return bool(then == now)


def compare(then: Any, now: Any, tolerance: float, what: str = "") -> tuple[list[str], list[str]]:
    """Compares two nested values.

    Returns:
        One line for each number whose bits differ, and for each that differs by more than ``tolerance`` of itself.
    """
    before, after = dict(_numbers(then)), dict(_numbers(now))
    changed = [name for name in dict.fromkeys([*before, *after]) if before.get(name) != after.get(name)]
    text = {name: f"{what}{name} was {before.get(name)!r} and is {after.get(name)!r}" for name in changed}
    far = [name for name in changed if not _close(before.get(name), after.get(name), tolerance)]
    return list(text.values()), [text[name] for name in far]


def _processor() -> str:
    """Name of this processor, and the instructions that torch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.processor())} with {torch.backends.cpu.get_cpu_capability()}"


def _machine(processor: str, packages: Mapping[str, str], others: Mapping[str, str]) -> str:
    """A processor, and those of its packages that the other one has in another version."""
    own = {name: number for name, number in packages.items() if others.get(name) != number}
    return ", ".join([processor, *(f"{name.removesuffix('-version')} {own[name]}" for name in sorted(own))])


def reproduce(name: str, records: Mapping[str, dict[str, Any]]) -> Reproduction:
    """Runs the cell of a name again, on one thread.

    Returns:
        How it compares with its record.

    Raises:
        StudyError: It has no record, or the base model or the task's text differ from those it was made with.
    """
    saved = records.get(name)
    if saved is None:
        raise StudyError(f"there is no record of a cell {name!r}; names are SETTING/ARM/rateR-seedS.")
    cell = Cell.from_config(saved["run_info"]["train_config"])
    if cell.fingerprint != saved["study_info"]["fingerprint"]:
        raise StudyError(
            f"the package's defaults have changed since {name!r} was made, so its cell would be another; check out "
            f"the commit {saved['study_info']['project_commit']} to run it again."
        )
    torch.set_num_threads(1)
    again = run_cell(cell)
    made = saved["meta_info"]
    for what, then, now in (
        ("base model", made["model_info"]["sha"], again["model_sha256"]),
        ("text of the task", made["dataset_info"][cell.setting.task]["sha"], again["data_sha256"]),
    ):
        if then != now:
            raise StudyError(
                f"the {what} is not the one that {name!r} was made with; use the versions that it names: "
                f"{made['package_info']}."
            )
    before, after = decided(saved["train_info"]["metrics"]), again["metrics"]
    bits: list[str] = []
    far: list[str] = []
    if len(before) != len(after):
        far.append(f"{len(before)} intervals then and {len(after)} now")
        bits.append(far[0])
    compared = [compare(a, b, _ROUNDING, f"step {a['step']}: ") for a, b in zip(before, after, strict=False)]
    probes = compare(saved["study_info"]["probes"], again["probes"], _ROUNDING_OF_PROBES, "probe ")
    for other_bits, other_results in [*compared, probes]:
        bits += other_bits
        far += other_results
    system, then_packages = made["system_info"], made["package_info"]
    packages = {f"{package}-version": version(package) for package in _PACKAGES} | packages_of(cell.setting.data)
    return Reproduction(
        tuple(bits),
        tuple(far),
        _machine(f"{system['processor']} with {system['cpu_capability']}", then_packages, packages),
        _machine(_processor(), packages, then_packages),
    )
