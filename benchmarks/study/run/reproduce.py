"""Runs a cell again from its result and compares every number that training decides.

Bit by bit on the processor and packages of the result. Other processors have other kernels, which add in another order,
so that elsewhere the same result has other last bits: losses then agree to some seven digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.study import StudyError
from benchmarks.study.run.result import make_result
from benchmarks.study.run.specification import Cell
from benchmarks.study.run.storage import Results
from benchmarks.study.run.training import run_cell

_TIMES = ("train time", "eval time", "tokens / sec")
# What another order of additions may change: seen were 1e-7 of a loss after 200 steps, and 6e-3 of a probe, where two
# channels at the border between tenths changed places.
_ROUNDING = 1e-5
_ROUNDING_OF_PROBES = 1e-2


@dataclass(frozen=True)
class Reproduction:
    """How a cell that ran again compares with its result.

    Attributes:
        other_bits: Every number that is not the same bit for bit, one line each.
        other_results: Those of them that differ by more than rounding.
        made_on: Processor of the result, with the packages whose versions differ.
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
    """Every number in nested lists and dictionaries, with its place."""
    if isinstance(value, dict | list):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(entry, f"{name} {key}".lstrip())
    else:
        yield name, value


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


def _machine(result: dict[str, Any], other: dict[str, Any]) -> str:
    """Processor of a result, and those of its packages that another one has in another version."""
    system, packages = result["meta_info"]["system_info"], result["meta_info"]["package_info"]
    parts = [f"{system['processor']} with {system['cpu_capability']}"]
    if system["accelerator"] != "none":
        parts.append(system["accelerator"])
    others = other["meta_info"]["package_info"]
    parts += sorted(
        {f"{name.removesuffix('-version')} {packages[name]}" for name in packages if packages[name] != others.get(name)}
    )
    return ", ".join(parts)


def reproduce(name: str, results: Results) -> Reproduction:
    """Runs the cell of a name again.

    Returns:
        How it compares with its result.

    Raises:
        StudyError: It has no result, or the base model or the task's text differ from those it was made with.
    """
    saved = results.get(name)
    if saved is None:
        raise StudyError(f"there is no result of a cell {name!r}; names are SETTING/ARM/rateR-seedS.")
    cell = Cell.from_config(saved["run_info"]["train_config"])
    if cell.fingerprint != saved["study_info"]["fingerprint"]:
        raise StudyError(
            f"the package's defaults have changed since {name!r} was made, so its cell would be another; check out "
            f"the commit {saved['study_info']['project_commit']} to run it again."
        )
    torch.set_num_threads(1)
    ran = run_cell(cell)
    again = make_result(cell, ran, 0.0)
    for what, then, now in (
        ("base model", saved["meta_info"]["model_info"], again["meta_info"]["model_info"]),
        ("text of the task", saved["meta_info"]["dataset_info"], again["meta_info"]["dataset_info"]),
    ):
        if then != now:
            raise StudyError(
                f"the {what} is not the one that {name!r} was made with; use the versions that it names: "
                f"{saved['meta_info']['package_info']}."
            )
    before, after = (decided(result["train_info"]["metrics"]) for result in (saved, again))
    bits: list[str] = []
    far: list[str] = []
    if len(before) != len(after):
        far.append(f"{len(before)} intervals then and {len(after)} now")
        bits.append(far[0])
    probes = (saved["study_info"]["probes"], again["study_info"]["probes"])
    compared = [compare(a, b, _ROUNDING, f"step {a['step']}: ") for a, b in zip(before, after, strict=False)]
    for other_bits, other_results in [*compared, compare(*probes, _ROUNDING_OF_PROBES, "probe ")]:
        bits += other_bits
        far += other_results
    return Reproduction(tuple(bits), tuple(far), _machine(saved, again), _machine(again, saved))
