"""Runs the cells of a study one after the other, leaving out those that have a result."""

from __future__ import annotations

import json
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.study import result_files
from benchmarks.study.errors import StudyError
from benchmarks.study.specification import Cell, Study, neighbour
from benchmarks.study.training import run_cell


def remaining(cells: Iterable[Cell], folder: Path) -> list[Cell]:
    """Cells without a result."""
    return [cell for cell in cells if not result_files.is_done(cell, folder)]


def run_study(
    study: Study, folder: Path, minutes: float | None = None, extend: int = 0, log: Callable[[str], None] = print
) -> int:
    """Runs what is left of a study; several processes may do so at once.

    Args:
        study: The study.
        folder: Where results are.
        minutes: Starts no cell that would, taking as long as the longest so far, end after this many minutes.
        extend: How often an arm's grid of learning rates may grow where its best rate is at the edge.
        log: Takes one line for each cell.

    Returns:
        Number of cells that failed.
    """
    torch.set_num_threads(1)
    started = time.monotonic()
    cells = list(study.cells())
    failed = 0
    longest = 0.0
    for extension in range(extend + 1):
        if extension:
            cells = extended(study, folder, extension)
        left = remaining(cells, folder)
        log(f"{study.name}: {len(left)} of {len(cells)} cells to run" + (" (more rates)" if extension else ""))
        for number, cell in enumerate(left, start=1):
            if minutes is not None and time.monotonic() - started + longest > 60 * minutes:
                log(f"time is up; {len(left) - number + 1} cells are left")
                return failed
            claim = result_files.Claim(result_files.path_of(cell, folder))
            if not claim.take():
                continue
            try:
                if result_files.is_done(cell, folder):
                    continue
                begun = time.monotonic()
                failed += not _run_and_write(cell, folder, log, f"[{number}/{len(left)}]")
                longest = max(longest, time.monotonic() - begun)
            finally:
                claim.release()
    return failed


def _run_and_write(cell: Cell, folder: Path, log: Callable[[str], None], prefix: str) -> bool:
    begun = time.perf_counter()
    file = result_files.path_of(cell, folder)
    failure = file.with_suffix(file.suffix + ".failed")
    try:
        ran = run_cell(cell)
    except Exception as error:  # A failing arm must not end the study; its trace is kept and it is tried again.
        if isinstance(error, StudyError):
            raise
        failure.parent.mkdir(parents=True, exist_ok=True)
        failure.write_text(json.dumps(cell.config()) + "\n" + traceback.format_exc())
        log(f"{prefix} {cell.name} FAILED: {type(error).__name__}: {str(error)[:200]}")
        return False
    failure.unlink(missing_ok=True)
    seconds = time.perf_counter() - begun
    result = result_files.make_result(cell, ran, seconds)
    result_files.write(result, file)
    last = result["train_info"]["metrics"][-1]
    log(f"{prefix} {cell.name} valid {last['valid loss']} test {last['test loss']} in {seconds:.1f} s")
    return True


def extended(study: Study, folder: Path, most: int) -> list[Cell]:
    """Cells of learning rates beyond the grid, for arms whose best rate so far is its lowest or highest.

    Args:
        study: The study.
        folder: Where results are.
        most: Rates that may be added to a grid on each side.
    """
    losses: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in result_files.read_all(folder):
        config = result["run_info"]["train_config"]
        if config["seed"] in study.seeds:
            losses[config["setting"], config["arm_name"]][config["rate"]].append(final_loss(result))
    cells = []
    for setting in study.settings:
        for arm in study.arms:
            by_rate = losses[setting.name, arm.name]
            grid = sorted({cell_rate for cell_rate in by_rate if len(by_rate[cell_rate]) == len(study.seeds)})
            if not grid:
                continue
            best = min(grid, key=lambda rate: sum(by_rate[rate]))
            planned = [float(f"{rate * arm.rate_factor:.4g}") for rate in setting.rates]
            for edge, factor in ((grid[0], 1 / study.rate_step), (grid[-1], study.rate_step)):
                allowed = max(planned) * study.rate_step**most * 1.01, min(planned) / study.rate_step**most / 1.01
                rate = neighbour(edge, factor)
                if best == edge and allowed[1] <= rate <= allowed[0]:
                    cells += [Cell(setting, arm, rate, seed) for seed in study.seeds]
    return cells


def final_loss(result: dict[str, Any]) -> float:
    """Validation loss at the end of a cell; infinite where it diverged."""
    loss = result["train_info"]["metrics"][-1]["valid loss"]
    return float("inf") if loss is None or result["train_info"]["status"] != "success" else float(loss)
