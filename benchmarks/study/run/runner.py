"""Runs the cells of a study one after the other, leaving out those that have a result."""

from __future__ import annotations

import json
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from filelock import FileLock, Timeout

from benchmarks.study import StudyError
from benchmarks.study.run.result import make_result
from benchmarks.study.run.specification import Cell, Study, neighbour
from benchmarks.study.run.storage import Results
from benchmarks.study.run.training import run_cell


def is_done(cell: Cell, results: Results) -> bool:
    """Whether the cell has a result.

    Raises:
        StudyError: It is the result of another cell, because an option was changed since.
    """
    saved = results.get(cell.name)
    if saved is None:
        return False
    if saved["study_info"]["fingerprint"] != cell.fingerprint:
        raise StudyError(
            f"the result of {cell.name!r} was made with other options than the study now gives this cell; rename the "
            "arm or the task."
        )
    return True


def remaining(cells: Iterable[Cell], results: Results) -> list[Cell]:
    """Cells without a result."""
    return [cell for cell in cells if not is_done(cell, results)]


def run_study(
    study: Study, results: Results, minutes: float | None = None, extend: int = 0, log: Callable[[str], None] = print
) -> int:
    """Runs what is left of a study; several processes may do so at once.

    Args:
        study: The study.
        results: Where results are.
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
            cells = extended(study, results, extension)
        left = remaining(cells, results)
        log(f"{study.name}: {len(left)} of {len(cells)} cells to run" + (" (more rates)" if extension else ""))
        for number, cell in enumerate(left, start=1):
            if minutes is not None and time.monotonic() - started + longest > 60 * minutes:
                log(f"time is up; {len(left) - number + 1} cells are left")
                return failed
            lock = results.path_of(cell.name).with_suffix(".lock")
            lock.parent.mkdir(parents=True, exist_ok=True)
            # A cell that another process works on is left to it; a process that died holds no lock.
            with suppress(Timeout), FileLock(lock, blocking=False):
                if is_done(cell, results):
                    continue
                begun = time.monotonic()
                failed += not _run_and_write(cell, results, log, f"[{number}/{len(left)}]")
                longest = max(longest, time.monotonic() - begun)
    return failed


def _run_and_write(cell: Cell, results: Results, log: Callable[[str], None], prefix: str) -> bool:
    begun = time.perf_counter()
    failure = results.path_of(cell.name).with_suffix(".failed")
    try:
        ran = run_cell(cell)
    except Exception as error:  # A failing arm must not end the study; its trace is kept and it is tried again.
        if isinstance(error, StudyError):
            raise
        failure.write_text(json.dumps(cell.config()) + "\n" + traceback.format_exc())
        log(f"{prefix} {cell.name} FAILED: {type(error).__name__}: {str(error)[:200]}")
        return False
    failure.unlink(missing_ok=True)
    seconds = time.perf_counter() - begun
    result = make_result(cell, ran, seconds)
    results.write(result)
    last = result["train_info"]["metrics"][-1]
    log(f"{prefix} {cell.name} valid {last['valid loss']} test {last['test loss']} in {seconds:.1f} s")
    return True


def extended(study: Study, results: Results, most: int) -> list[Cell]:
    """Cells of learning rates beyond the grid, for arms whose best rate so far is its lowest or highest.

    Args:
        study: The study.
        results: Where results are.
        most: Rates that may be added to a grid on each side.
    """
    losses: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results.all():
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
