"""Tables and figures of a study, from its result files alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.study import StudyError
from benchmarks.study.report.comparison import Table, Verdict, When, bootstrap_interval, compare, sign_test, verdicts
from benchmarks.study.report.mechanism import Mechanism, mechanisms

Rows = list[list[str]]
VERDICT_HEAD = ["arm", "settings", "test loss, % of baseline", "95 % interval", "better", "p", "p (Holm)", "time"]
_SETTING_HEAD = [
    "arm",
    "rate",
    "seeds",
    "valid",
    "test",
    "difference",
    "95 % interval",
    "better",
    "p",
    "exact",
    "forgetting",
    "|Δρ|",
    "time",
    "MiB",
    "parameters",
]
MECHANISM_HEAD = [
    "arm",
    "pairs",
    "|Δρ| ÷ baseline",
    "lower",
    "forgetting − baseline",
    "lower",
    "test loss − baseline",
    "silent ÷ responsive rows",
]


def shown(value: float, digits: int = 4, sign: bool = False) -> str:
    """A number for a table: a dash where it was not measured, a word where it is infinite."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "diverged"
    # Adding zero makes a rounded -0.0 a plain zero, which has no direction.
    return f"{round(value, digits) + 0.0:{'+' if sign else ''}.{digits}f}"


def _mean(values: Iterable[float]) -> float:
    given = list(values)
    return sum(given) / len(given) if given else math.inf


def verdict_rows(found: Mapping[str, Verdict]) -> Rows:
    """One row for each arm: pooled over settings."""
    return [
        [
            arm,
            str(one.settings),
            shown(one.relative, 2, sign=True),
            f"{shown(one.interval[0], 2, sign=True)} … {shown(one.interval[1], 2, sign=True)}",
            f"{one.better}/{one.pairs}",
            f"{one.p_value:.3f}",
            f"{one.adjusted:.3f}",
            shown(one.time, 2),
        ]
        for arm, one in found.items()
    ]


def mechanism_rows(found: Mapping[str, Mechanism]) -> Rows:
    """One row for each arm: what it changes at equal rates and seeds."""
    return [
        [
            arm,
            str(one.pairs),
            shown(one.misalignment, 3),
            "/".join(map(str, one.less_misaligned)),
            shown(one.forgetting, 4, sign=True),
            "/".join(map(str, one.less_forgotten)),
            shown(one.worse, 4, sign=True),
            shown(one.walk, 3),
        ]
        for arm, one in found.items()
    ]


def setting_rows(table: Table, setting: str, baseline: str) -> Rows:
    """One row for each arm of a setting, greatest gain over the baseline first; an edge rate is marked with ``!``."""
    arms = table[setting]
    rows = []
    for arm, found in sorted(arms.items(), key=lambda entry: (_mean(entry[1].differences.values()), entry[0])):
        differences = list(found.differences.values())
        paired = ["", "", "", ""]
        if arm != baseline and differences and all(map(math.isfinite, differences)):
            lower, upper = bootstrap_interval([differences])
            better, pairs, p_value = sign_test(differences)
            paired = [
                shown(_mean(differences), sign=True),
                f"{shown(lower, sign=True)} … {shown(upper, sign=True)}",
                f"{better}/{pairs}",
                f"{p_value:.3f}",
            ]
        rows.append(
            [
                arm,
                f"{found.bottom:.3g}{'!' if found.at_edge else ''}",
                str(len(found.scores)),
                shown(found.average("valid")),
                shown(found.average("test")),
                *paired,
                shown(100 * found.average("accuracy"), 1),
                shown(found.average("forgetting"), 3, sign=True),
                shown(found.average("misalignment")),
                shown(found.average("seconds") / arms[baseline].average("seconds"), 2) if baseline in arms else "–",
                shown(found.average("memory") / 2**20, 0),
                str(round(found.average("parameters"))),
            ]
        )
    return rows


def markdown_table(head: Sequence[str], rows: Rows) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


Sections = dict[str, tuple[list[str], Rows]]


def sections(results: Sequence[Mapping[str, Any]], table: Table, baseline: str) -> Sections:
    """Heads and rows of all tables, by title."""
    found: Sections = {
        "All settings": (VERDICT_HEAD, verdict_rows(verdicts(table, baseline))),
        "Mechanism, at equal rates and seeds": (MECHANISM_HEAD, mechanism_rows(mechanisms(results, baseline))),
    }
    return found | {setting: (_SETTING_HEAD, setting_rows(table, setting, baseline)) for setting in table}


def markdown(parts: Sections, baseline: str, title: str) -> str:
    """The whole report in Markdown."""
    text = [
        f"# {title}",
        f"Baseline `{baseline}`. Rates are chosen by validation loss, scores are of the test set; differences are "
        "paired by seed, negative is better; `!` marks a best rate at the edge of its grid, `p` is the sign test's.",
    ]
    for name, (head, rows) in parts.items():
        text += [f"## {name}", markdown_table(head, rows)]
    return "\n\n".join(text) + "\n"


def show(parts: Sections, console: Console | None = None) -> None:
    """Prints the report."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=200)
    for title, (head, rows) in parts.items():
        printed = RichTable(title=title, title_justify="left")
        for index, name in enumerate(head):
            printed.add_column(name, justify="left" if index == 0 else "right", no_wrap=index == 0)
        for row in rows:
            printed.add_row(*row)
        console.print(printed)


def make_report(
    results: Sequence[Mapping[str, Any]],
    baseline: str,
    when: When,
    output: Path | None,
    title: str,
    figures: bool,
    interpolate: bool = False,
) -> Table:
    """Prints a report, and writes it with its figures where ``output`` is a folder.

    Raises:
        StudyError: There are no results of the baseline, or figures are wanted without matplotlib.
    """
    table = compare(results, baseline, when, interpolate)
    if not any(baseline in arms for arms in table.values()):
        raise StudyError(f"no result of the baseline {baseline!r} is complete for any seed; run the study further.")
    parts = sections(results, table, baseline)
    show(parts)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "report.md").write_text(markdown(parts, baseline, title))
        if figures:
            from benchmarks.study.report.figures import draw

            draw(results, table, baseline, when, output)
    return table
