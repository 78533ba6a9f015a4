"""The result of a comparison as a page, as Markdown, and its cells as CSV; the same bytes from the same cells."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from na_lora_lightning.compare.grid import ScoredCell
from na_lora_lightning.compare.plan import Plan
from na_lora_lightning.compare.results import Table, common_tables, headline, missing, tuned_table
from na_lora_lightning.compare.statistics import Estimate
from na_lora_lightning.compare.storage import Comparison
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.report.page import render

_COLUMNS = (
    "task", "arm", "rate", "seed", "validation", "test", "other_loss", "base_other_loss", "other_kl", "own_loss",
    "base_own_loss", "own_kl", "seconds", "peak_memory", "steps", "parameters", "device",
)  # fmt: skip


@dataclass(frozen=True)
class Section:
    """A table with its words.

    Attributes:
        title: Heading.
        head: Names of the columns.
        rows: Cells of the table.
        note: What the columns mean.
        figure: A picture as SVG, or nothing.
    """

    title: str
    head: Sequence[str]
    rows: list[list[str]]
    note: str
    figure: Markup = field(default=Markup())


def write_page(comparison: Comparison, folder: str, margin: float) -> list[Path]:
    """Writes ``page.html``, ``page.md`` and ``cells.csv``.

    Args:
        comparison: What was compared.
        folder: Where to write them.
        margin: Per cent within which arms are called equal.

    Returns:
        The files.

    Raises:
        ConfigurationError: They cannot be written.
    """
    scored, plan = comparison.scored(), comparison.plan
    title = f"Comparison {comparison.study.study_name}"
    texts = {
        "page.html": as_html(title, scored, plan, margin),
        "page.md": as_markdown(title, scored, plan, margin),
        "cells.csv": as_csv(scored),
    }
    paths = []
    for name, text in texts.items():
        path = Path(folder).expanduser() / name
        partial = path.with_name(f".{name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            raise ConfigurationError(
                f"the result cannot be written to {str(path)!r} ({error.strerror}); give another --output."
            ) from error
        paths.append(path)
    return paths


def as_html(title: str, scored: Sequence[ScoredCell], plan: Plan, margin: float) -> str:
    """The page."""
    tuned = tuned_table(scored, plan, margin)
    return render(
        "na_lora_lightning.compare",
        title=title,
        headline=headline(tuned, plan, margin),
        scope=_scope(scored, plan),
        sections=_sections(tuned, common_tables(scored, plan, margin), plan, margin),
    )


def as_markdown(title: str, scored: Sequence[ScoredCell], plan: Plan, margin: float) -> str:
    """The same as Markdown."""
    tuned = tuned_table(scored, plan, margin)
    lines = [f"# {title}", "", f"**{headline(tuned, plan, margin)}**", "", _scope(scored, plan)]
    for section in _sections(tuned, common_tables(scored, plan, margin), plan, margin):
        rows = [list(section.head), ["---", *["---:"] * (len(section.head) - 1)], *section.rows]
        lines += [
            "",
            f"## {section.title}",
            "",
            *(f"| {' | '.join(_escaped(row))} |" for row in rows),
            "",
            section.note,
        ]
    return "\n".join(lines) + "\n"


def as_csv(scored: Sequence[ScoredCell]) -> str:
    """All cells, a line for each."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for entry in scored:
        values = {**entry.result, **vars(entry.cell)}
        writer.writerow(["" if values.get(name) is None else values[name] for name in _COLUMNS])
    return file.getvalue()


def _escaped(row: Sequence[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in row]


def _scope(scored: Sequence[ScoredCell], plan: Plan) -> str:
    left = missing(scored, plan)
    devices = ", ".join(sorted({entry.result["device"] for entry in scored}))
    return (
        f"{len(scored)} fits{f' on {devices}' if devices else ''}; {left or 'none'} of the grid "
        f"{'is' if left < 2 else 'are'} missing. Test loss against {plan.baseline}, paired by seed; below 0 is "
        f"better. Rates were chosen by validation loss."
    )


def _sections(tuned: Table, common: Sequence[Table], plan: Plan, margin: float) -> list[Section]:
    return [
        Section(
            "Test loss at tuned rates",
            [
                "arm",
                "change in %",
                "95 % (seeds)",
                "95 % (records)",
                "better in",
                "p",
                "verdict",
                *tuned.baseline_rates,
            ],
            [
                [
                    row.arm,
                    signed(row.estimate.mean),
                    interval(row.estimate.low, row.estimate.high),
                    interval(*row.records),
                    f"{row.estimate.negative}/{row.estimate.pairs}",
                    number(row.adjusted),
                    row.verdict,
                    *(f"{row.rates[task]:g}" if task in row.rates else "" for task in tuned.baseline_rates),
                ]
                for row in tuned.rows
            ],
            f"Student's interval over seeds; bootstrap over test records; exact sign test, Holm over the arms; 'equal' "
            f"is within ±{margin:g} % by two one-sided tests. The last columns are the rates. {_baseline(tuned, plan)}",
        ),
        Section(
            "By task",
            ["arm", *plan.tasks],
            [[row.arm, *(_with_interval(row.by_task.get(task)) for task in plan.tasks)] for row in tuned.rows],
            "Change of test loss in %, with the 95 % interval over seeds.",
        ),
        Section(
            "At one common rate",
            ["arm", "tuned", *(f"{table.rate:g}" for table in common)],
            [
                [row.arm, _with_interval(row.estimate), *(_with_interval(_of(table, row.arm)) for table in common)]
                for row in tuned.rows
            ],
            "What a comparison without tuned rates would have said: all arms at the rate of the column.",
        ),
        Section(
            "Forgetting, cost and gates",
            [
                "arm",
                "KL to the base model",
                "change in %",
                "rise of loss",
                "KL on its answers",
                "time",
                "memory",
                "gates",
            ],
            [
                [
                    row.arm,
                    number(row.forgetting),
                    signed(row.forgetting_change),
                    signed(row.other_loss),
                    number(row.own),
                    number(row.seconds),
                    "" if row.memory is None else number(row.memory),
                    ", ".join(f"{name} {number(value)}" for name, value in sorted(row.gates.items())),
                ]
                for row in tuned.rows
            ],
            "On other text, and on what the base model itself answers to prompts of validation, nats per token; time "
            f"and memory over {plan.baseline}'s, at tuned rates. A model that was "
            "moved further, by a higher rate, forgets more: compare at equal loss.",
        ),
    ]


def _baseline(table: Table, plan: Plan) -> str:
    parts = [f"{task} {table.baseline_losses[task]:.4f} at {rate:g}" for task, rate in table.baseline_rates.items()]
    return f"{plan.baseline}: {', '.join(parts)} (nats per token)." if parts else ""


def _of(table: Table, arm: str) -> Estimate | None:
    return next((row.estimate for row in table.rows if row.arm == arm), None)


def _with_interval(found: Estimate | None) -> str:
    if found is None or math.isnan(found.mean):
        return ""
    return f"{signed(found.mean)} {interval(found.low, found.high)}".strip()


def signed(value: float) -> str:
    """A number with its sign; nothing for NaN."""
    return "" if math.isnan(value) else f"{value:+.2f}"


def interval(low: float, high: float) -> str:
    """An interval; nothing for NaN."""
    return "" if math.isnan(low) or math.isnan(high) else f"({low:+.2f} … {high:+.2f})"


def number(value: Any) -> str:
    """Three digits; nothing for NaN."""
    return "" if math.isnan(value) else f"{value:.3g}"
