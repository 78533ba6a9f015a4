"""Writes the pages of evidence and their figures from results, so that no number in them is typed in.

The pages are the templates in ``pages/`` (Jinja). They know every table of ``studies.yaml`` by its name:
``{{ confirmation }}`` is all of it, ``{{ confirmation.dora["95 % interval"] }}`` one cell of one row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError

from benchmarks.real_weights.curves import pyplot, save
from benchmarks.real_weights.evidence import draw_figures, exports, page_parts
from benchmarks.real_weights.magnitudes import all_points, draw, page_part
from benchmarks.study import StudyError
from benchmarks.study.report import mechanism, tables
from benchmarks.study.report.comparison import bootstrap_interval, score_of, verdicts
from benchmarks.study.report.mechanism import mechanisms
from benchmarks.study.report.tables import Rows, Sources

KINDS = tables.KINDS | mechanism.KINDS
SPECIFICATION = Path(__file__).parents[1] / "studies.yaml"
PAGES = Path(__file__).with_name("pages")
DOCUMENTS = Path(__file__).parents[3] / "docs"
SCREENING, CONFIRMATION = "second_round", "confirmation"
_WALKERS = ("lora", "mask", "mask_tail", "random")
# One of each kind, as far as their names do not lie on each other.
_MOVERS = ("dora", "gates_slow_a", "mask", "mask_keep_75", "others_slow_a", "rslora", "scale", "tail_channel")


@dataclass(frozen=True)
class EvidenceTable:
    """A table: all of it as text, or one cell of it as ``table[row][column]``.

    Attributes:
        head: Names of the columns.
        rows: Cells; the first of a row is the row's name.
    """

    head: list[str]
    rows: Rows

    def __str__(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)

    def __getitem__(self, row: str) -> dict[str, str]:
        return {line[0]: dict(zip(self.head, line, strict=True)) for line in self.rows}[row]


def make_tables(sources: Sources, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, EvidenceTable]:
    """Every table of ``tables`` in studies.yaml: its kind and the kind's options."""
    made = {}
    for name, options in wanted.items():
        rest = dict(options)
        made[name] = EvidenceTable(*KINDS[rest.pop("kind")](sources, **rest))
    return made


def make_pages(parts: Mapping[str, Any], templates: Path = PAGES) -> dict[str, str]:
    """The text of every page, by file name.

    Raises:
        StudyError: A page asks for something that no table has.
    """
    environment = Environment(
        loader=FileSystemLoader(templates),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        autoescape=False,
    )
    pages = {}
    for file in sorted(templates.glob("*.md")):
        try:
            pages[file.name] = environment.get_template(file.name).render(parts)
        except UndefinedError as error:
            raise StudyError(f"the page {file.name} asks for what no table of studies.yaml has: {error}.") from error
    return pages


def write_evidence(results: Iterable[dict[str, Any]], check: bool = False) -> bool:
    """Writes the pages into ``docs/``, and their figures into ``docs/figures/``.

    Args:
        results: All results.
        check: Write nothing.

    Returns:
        Whether the pages already said what the results say.
    """
    specification = yaml.safe_load(SPECIFICATION.read_text())
    results = list(results)
    sources = Sources(results, specification["studies"])
    points = all_points(results, exports())
    tables = make_tables(sources, specification["tables"])
    pages = make_pages({**tables, **page_parts(), "magnitudes": page_part(points)})
    same = all((file := DOCUMENTS / name).is_file() and file.read_text() == text for name, text in pages.items())
    if not check:
        for name, text in pages.items():
            (DOCUMENTS / name).write_text(text)
        draw_all(sources, DOCUMENTS / "figures")
        draw_figures(DOCUMENTS / "figures")
        draw(points, DOCUMENTS / "figures" / "dora_magnitudes.svg")
    return same


def draw_all(sources: Sources, folder: Path) -> None:
    """Draws ``walk.svg``, ``misalignment.svg`` and ``confirmation.svg``."""
    plt = pyplot()
    save(plt, walk(plt, sources), folder / "walk.svg")
    save(plt, misalignment(plt, sources), folder / "misalignment.svg")
    save(plt, confirmation(plt, sources), folder / "confirmation.svg")


def walk(plt: Any, sources: Sources) -> Any:
    """Norm of rows of B at the end over their mean, by decile of |φ'| of their channels; one panel a setting."""
    norms: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for result in sources.results(SCREENING):
        config, last = result["run_info"]["train_config"], result["study_info"]["probes"][-1]
        if config["arm_name"] in _WALKERS and result["train_info"]["status"] == "success":
            rows = last["row_norm"]["output"]
            norms[config["setting"]][config["arm_name"]].append([row / mean(rows) for row in rows])
    figure, grid = plt.subplots(
        1, max(1, len(norms)), figsize=(3.6 * max(1, len(norms)), 3), layout="constrained", squeeze=False, sharey=True
    )
    for axes, (setting, by_arm) in zip(grid[0], sorted(norms.items()), strict=False):
        for arm in _WALKERS:
            if by_arm[arm]:
                axes.plot(range(1, 11), [mean(column) for column in zip(*by_arm[arm], strict=True)], label=arm)
        axes.set(xlabel="decile of |φ'|, least to most responsive", title=setting)
    grid[0][0].set_ylabel("norm of a row of B ÷ mean")
    grid[0][0].legend(fontsize=7)
    return figure


def misalignment(plt: Any, sources: Sources) -> Any:
    """Left: plain LoRA's cells. Right: arms at LoRA's learning rates, forgetting against how far selection moved."""
    results = sources.results(SCREENING)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    plain: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for result in results:
        config = result["run_info"]["train_config"]
        if config["arm_name"] == "lora" and result["train_info"]["status"] == "success":
            score = score_of(result)
            if score.misalignment:
                plain[config["setting"]].append((score.misalignment, score.forgetting))
    for setting, points in sorted(plain.items()):
        left.plot(*zip(*points, strict=True), "o", markersize=4, label=setting)
    left.set(xscale="log", yscale="log", xlabel="mean |Δρ|", ylabel="forgetting, nats", title="plain LoRA, all rates")
    left.legend(fontsize=7)
    for arm, one in mechanisms(results, "lora").items():
        if arm in _MOVERS:
            right.plot(one.misalignment, one.forgetting, "o", color="tab:blue", markersize=4)
            right.annotate(
                arm, (one.misalignment, one.forgetting), fontsize=6, xytext=(3, 2), textcoords="offset points"
            )
    right.margins(x=0.12)
    right.axhline(0.0, color="gray", linewidth=0.8)
    right.axvline(1.0, color="gray", linewidth=0.8)
    right.set(
        xlabel="|Δρ| ÷ that of LoRA", ylabel="forgetting minus that of LoRA, nats", title="at equal learning rates"
    )
    return figure


def confirmation(plt: Any, sources: Sources) -> Any:
    """Difference of the test loss from plain LoRA's, with interval, by setting and pooled."""
    table = sources.table(CONFIRMATION)
    found = verdicts(table, "lora")
    figure, grid = plt.subplots(
        1, 1 + len(table), figsize=(3 * (1 + len(table)), 1 + 0.28 * len(found)), layout="constrained", sharey=True
    )
    panels = [("all settings", {arm: (one.relative, one.interval) for arm, one in found.items()})]
    for setting, arms in table.items():
        own = {}
        for arm in found:
            if arm in arms and arms[arm].differences:
                level = mean(arms["lora"].scores[seed].test for seed in arms[arm].differences)
                values = [100 * value / level for value in arms[arm].differences.values()]
                own[arm] = (mean(values), bootstrap_interval([values]))
        panels.append((setting, own))
    for axes, (title, points) in zip(grid, panels, strict=True):
        for row, arm in enumerate(found):
            if arm in points and abs(points[arm][0]) < 50:
                value, interval = points[arm]
                axes.plot(interval, [row, row], color="tab:blue")
                axes.plot(value, row, "o", color="tab:blue", markersize=4)
        axes.axvline(0.0, color="gray", linewidth=0.8)
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("test loss − LoRA, %", fontsize=8)
    grid[0].set_yticks(range(len(found)), list(found))
    grid[0].invert_yaxis()
    return figure
