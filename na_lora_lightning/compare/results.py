"""What a comparison says so far: tables of plain values, in words and numbers, from its scored cells alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from na_lora_lightning.compare.grid import ScoredCell, best_rate, mean_validation
from na_lora_lightning.compare.plan import Plan
from na_lora_lightning.compare.statistics import Estimate, estimate, holm, record_interval

_SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Row:
    """An arm against the first one.

    Attributes:
        arm: Its name.
        rates: Learning rate on each task.
        estimate: Difference of test loss, in per cent of the first arm's; below 0 is better.
        by_task: The same for each task.
        records: 95 % interval over test records, in per cent.
        adjusted: p-value of the sign test, by Holm over the arms of the table.
        verdict: ``"better"``, ``"worse"``, ``"equal"`` or ``"open"``.
        forgetting: Mean KL(base ‖ model) on other text, nats per token.
        forgetting_change: Its difference to the first arm's, in per cent.
        other_loss: Rise of the loss on other text over the base model's, nats per token.
        own: Mean KL(base ‖ model) on what the base model itself answers, nats per token.
        seconds: Of training, over the first arm's.
        memory: Peak, over the first arm's; None where it was not measured.
        gates: Means of what the mechanisms measured.
    """

    arm: str
    rates: dict[str, float]
    estimate: Estimate
    by_task: dict[str, Estimate]
    records: tuple[float, float]
    adjusted: float
    verdict: str
    forgetting: float
    forgetting_change: float
    other_loss: float
    own: float
    seconds: float
    memory: float | None
    gates: dict[str, float]


@dataclass(frozen=True)
class Table:
    """All arms against the first one, at tuned rates or at a common one.

    Attributes:
        title: What the rates are.
        rate: The common rate; None where each arm has its own.
        rows: The arms but the first.
        baseline_rates: Rate of the first arm on each task.
        baseline_losses: Mean test loss of the first arm on each task.
        detectable: Difference in per cent that is found in 80 % of all comparisons like this one, the median over arms.
    """

    title: str
    rate: float | None
    rows: list[Row]
    baseline_rates: dict[str, float]
    baseline_losses: dict[str, float]
    detectable: float


Group = dict[int, ScoredCell]


def _groups(scored: Sequence[ScoredCell]) -> dict[tuple[str, str], dict[float, Group]]:
    """Cells by task and arm, then rate, then seed."""
    found: dict[tuple[str, str], dict[float, Group]] = {}
    for entry in scored:
        cell = entry.cell
        found.setdefault((cell.task, cell.arm), {}).setdefault(cell.rate, {})[cell.seed] = entry
    return found


def tuned_rates(scored: Sequence[ScoredCell], plan: Plan) -> dict[tuple[str, str], float]:
    """The rate of each arm on each task that has the lowest mean validation loss over the seeds."""
    found = {}
    for task in plan.tasks:
        for arm in plan.arms:
            own = [entry for entry in scored if (entry.cell.task, entry.cell.arm) == (task, arm)]
            if means := mean_validation(own):
                found[task, arm] = best_rate(means)
    return found


def tuned_table(scored: Sequence[ScoredCell], plan: Plan, margin: float) -> Table:
    """All arms, each at its own best rate."""
    chosen = tuned_rates(scored, plan)
    return _table("each arm at its own best rate", None, scored, plan, chosen, margin)


def common_tables(scored: Sequence[ScoredCell], plan: Plan, margin: float) -> list[Table]:
    """All arms at one rate, for each rate of the plan."""
    found = []
    for rate in plan.rates:
        chosen = {(task, arm): rate for task in plan.tasks for arm in plan.arms}
        found.append(_table(f"all arms at {rate:g}", rate, scored, plan, chosen, margin))
    return found


def _table(
    title: str,
    rate: float | None,
    scored: Sequence[ScoredCell],
    plan: Plan,
    chosen: dict[tuple[str, str], float],
    margin: float,
) -> Table:
    groups = _groups(scored)
    at = {key: groups.get(key, {}).get(own, {}) for key, own in chosen.items()}
    baseline = {task: at.get((task, plan.baseline), {}) for task in plan.tasks}
    rows = []
    for arm in plan.arms:
        if arm == plan.baseline:
            continue
        pairs = {}
        for task in plan.tasks:
            own, other = at.get((task, arm), {}), baseline[task]
            if seeds := sorted(own.keys() & other.keys()):
                pairs[task] = [(own[seed], other[seed]) for seed in seeds]
        if pairs:
            rates = {task: chosen[task, arm] for task in pairs}
            rows.append(_row(arm, rates, pairs))
    adjusted = holm([row.estimate.sign_p for row in rows])
    rows = [_judged(row, p_value, margin) for row, p_value in zip(rows, adjusted, strict=True)]
    rows.sort(key=lambda row: (math.isnan(row.estimate.mean), row.estimate.mean, row.arm))
    reach = [row.estimate.detectable for row in rows if not math.isnan(row.estimate.detectable)]
    return Table(
        title,
        rate,
        rows,
        {task: chosen[task, plan.baseline] for task in plan.tasks if baseline[task]},
        {task: fmean(entry.result["test"] for entry in own.values()) for task, own in baseline.items() if own},
        float(np.median(reach)) if reach else math.nan,
    )


Pairs = dict[str, list[tuple[ScoredCell, ScoredCell]]]


def _row(arm: str, rates: dict[str, float], pairs: Pairs) -> Row:
    differences = {task: [relative(a.result["test"], b.result["test"]) for a, b in own] for task, own in pairs.items()}
    everything = [pair for own in pairs.values() for pair in own]
    kl = [entry.result.get("other_kl", math.nan) for entry, _ in everything]
    base_kl = [entry.result.get("other_kl", math.nan) for _, entry in everything]
    rises = [
        entry.result.get("other_loss", math.nan) - entry.result.get("base_other_loss", math.nan)
        for entry, _ in everything
    ]
    memory = [(a.result["peak_memory"], b.result["peak_memory"]) for a, b in everything]
    gates = [entry.result["gates"] for entry, _ in everything]
    return Row(
        arm,
        rates,
        estimate(list(differences.values())),
        {task: estimate([values]) for task, values in differences.items()},
        record_interval([arrays for own in pairs.values() if (arrays := _records(own)) is not None]),
        math.nan,
        "open",
        fmean(kl),
        relative(fmean(kl), fmean(base_kl)),
        fmean(rises),
        fmean(entry.result.get("own_kl", math.nan) for entry, _ in everything),
        float(np.median([a.result["seconds"] / b.result["seconds"] for a, b in everything])),
        float(np.median([a / b for a, b in memory])) if all(a and b for a, b in memory) else None,
        {name: fmean(each[name] for each in gates) for name in gates[0] if all(name in each for each in gates)},
    )


def _records(pairs: list[tuple[ScoredCell, ScoredCell]]) -> Any:
    """Losses of the records of one task; None where a cell diverged."""
    if not all(entry.result["test_sums"] for pair in pairs for entry in pair):
        return None
    arm, baseline = (np.array([entry.result["test_sums"] for entry in side]) for side in zip(*pairs, strict=True))
    return arm, baseline, np.array(pairs[0][0].result["test_tokens"])


def relative(value: float, reference: float) -> float:
    """Difference in per cent of the reference; NaN where one of them is not finite."""
    if not (math.isfinite(value) and math.isfinite(reference)) or reference == 0:
        return math.nan
    return 100 * (value / reference - 1)


def _judged(row: Row, adjusted: float, margin: float) -> Row:
    found = row.estimate
    if found.high < 0:
        verdict = "better"
    elif found.low > 0:
        verdict = "worse"
    else:
        verdict = "equal" if found.is_within(margin) else "open"
    return Row(**{**row.__dict__, "adjusted": adjusted, "verdict": verdict})


def headline(table: Table, plan: Plan, margin: float) -> str:
    """One sentence that says what was shown, and what was not."""
    if not table.rows:
        return "Nothing can be said yet: no seed has both the first arm and another one."

    def those(verdict: str) -> str:
        return ", ".join(row.arm for row in table.rows if row.verdict == verdict)

    parts = []
    words = {
        "better": f"better than {plan.baseline}",
        "worse": f"worse than {plan.baseline}",
        "equal": f"equal to it within ±{margin:g} %",
        "open": "undecided",
    }
    for verdict, meaning in words.items():
        if names := those(verdict):
            verb = "are" if "," in names else "is"
            parts.append(f"{names} {verb} {meaning}")
    most = max(row.estimate.pairs for row in table.rows)
    reach = (
        "no difference can be told"
        if math.isnan(table.detectable)
        else (f"no difference below {table.detectable:.2g} % can be told")
    )
    tasks = len(plan.tasks)
    pooled = f"At tuned rates {'; '.join(parts)}: with {most} pairs on {tasks} task{'s' if tasks > 1 else ''} {reach}."
    return " ".join(filter(None, (pooled, _on_single_tasks(table) if tasks > 1 else "")))


def _on_single_tasks(table: Table) -> str:
    """What is told on a task by itself, which a task whose seeds differ more would hide in the mean."""
    found = [(row.arm, task, each) for row in table.rows for task, each in row.by_task.items()]
    adjusted = holm([each.p_value for *_, each in found])
    tasks: dict[tuple[str, str], list[str]] = {}
    for (arm, task, each), p_value in zip(found, adjusted, strict=True):
        if p_value < _SIGNIFICANT:
            tasks.setdefault((arm, "better" if each.mean < 0 else "worse"), []).append(task)
    if not tasks:
        return ""
    parts = (f"{arm} is {word} on {', '.join(names)}" for (arm, word), names in tasks.items())
    return f"On single tasks, after Holm's adjustment for all {len(found)}: {'; '.join(parts)}."


def missing(scored: Sequence[ScoredCell], plan: Plan) -> int:
    """Number of cells of the grid that are not scored."""
    return len(set(plan.cells()) - {entry.cell for entry in scored})
