"""Runs a cell again from its result file and compares every number that training decides, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.study import result_files
from benchmarks.study.errors import StudyError
from benchmarks.study.specification import Cell
from benchmarks.study.training import run_cell

_TIMES = ("train time", "eval time", "tokens / sec")


def decided(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without those that a clock decides."""
    return [{name: value for name, value in entry.items() if name not in _TIMES} for entry in metrics]


def reproduce(file: Path) -> list[str]:
    """Runs the cell of a result file again.

    Returns:
        What differs, one line each; empty where all is equal.

    Raises:
        StudyError: The file is no result, or the base model or the task's text differ from those it was made with.
    """
    saved = result_files.read(file)
    cell = Cell.from_config(saved["run_info"]["train_config"])
    if cell.fingerprint != saved["study_info"]["fingerprint"]:
        raise StudyError(
            f"the package's defaults have changed since {file.name} was made, so its cell would be another; check out "
            f"the commit {saved['study_info']['project_commit']} to run it again."
        )
    torch.set_num_threads(1)
    ran = run_cell(cell)
    again = result_files.make_result(cell, ran, 0.0)
    for what, then, now in (
        ("base model", saved["meta_info"]["model_info"], again["meta_info"]["model_info"]),
        ("text of the task", saved["meta_info"]["dataset_info"], again["meta_info"]["dataset_info"]),
    ):
        if then != now:
            raise StudyError(
                f"the {what} is not the one that {file.name} was made with; use the versions that it names: "
                f"{saved['meta_info']['package_info']}."
            )
    differences = []
    before, after = (decided(result["train_info"]["metrics"]) for result in (saved, again))
    if len(before) != len(after):
        differences.append(f"{len(before)} intervals then and {len(after)} now")
    for then, now in zip(before, after, strict=False):
        differences += [
            f"step {then['step']}: {name} was {then[name]!r} and is {now.get(name)!r}"
            for name in then
            if then[name] != now.get(name)
        ]
    if saved["study_info"]["probes"] != again["study_info"]["probes"]:
        differences.append("the probes differ")
    return differences
