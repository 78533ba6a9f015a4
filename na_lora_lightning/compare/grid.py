"""Learning rates: which is the best of an arm, which are added to the grid, and which are left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from na_lora_lightning.compare.plan import Cell, Plan

Result = dict[str, Any]


@dataclass(frozen=True)
class ScoredCell:
    """A cell with what was measured.

    Attributes:
        cell: Which.
        validation: Validation loss, nats per target token; infinite where training diverged.
        result: All numbers, as :mod:`~na_lora_lightning.compare.cells` makes them.
    """

    cell: Cell
    validation: float
    result: Result


def mean_validation(scored: Iterable[ScoredCell]) -> dict[float, float]:
    """Mean validation loss by rate, of the rates that have as many seeds as the one with the most."""
    by_rate: dict[float, list[float]] = {}
    for entry in scored:
        by_rate.setdefault(entry.cell.rate, []).append(entry.validation)
    most = max(map(len, by_rate.values()), default=0)
    return {rate: sum(each) / len(each) for rate, each in sorted(by_rate.items()) if len(each) == most}


def best_rate(means: dict[float, float]) -> float:
    """The rate of the lowest mean validation loss, the lower one of equals."""
    return min(means, key=lambda rate: (means[rate], rate))


def extensions(scored: Sequence[ScoredCell], plan: Plan, is_over: bool = True) -> list[float]:
    """Rates beyond those of the plan for one arm on one task: the next of the series where the last is the best.

    Args:
        scored: Its cells.
        plan: What is compared.
        is_over: Whether none of its cells is waiting or running, so that its best rate can be told.

    Returns:
        The rates, those that were added before among them.
    """
    rates = sorted({entry.cell.rate for entry in scored} | set(plan.rates))
    found = [rate for rate in rates if rate not in plan.rates]
    means = mean_validation(scored)
    if not is_over or len(rates) < 2 or not means:
        return found
    best = best_rate(means)
    below = sum(rate < plan.rates[0] for rate in found)
    above = sum(rate > plan.rates[-1] for rate in found)
    if best == rates[0] and below < plan.extend:
        found.append(_rounded(rates[0] ** 2 / rates[1]))
    if best == rates[-1] and above < plan.extend:
        found.append(_rounded(rates[-1] ** 2 / rates[-2]))
    return found


def _rounded(rate: float) -> float:
    # So that all arms of a series share it.
    return float(f"{rate:.2g}")


def is_hopeless(cell: Cell, scored: Sequence[ScoredCell], plan: Plan) -> bool:
    """Whether a cell's rate is left out, for what it came to at the first seed."""
    if plan.prune is None or cell.seed == 0:
        return False
    own = {
        entry.cell.rate: entry.validation
        for entry in scored
        if (entry.cell.task, entry.cell.arm, entry.cell.seed) == (cell.task, cell.arm, 0)
    }
    return cell.rate in own and own[cell.rate] > min(own.values()) * (1 + plan.prune / 100)
