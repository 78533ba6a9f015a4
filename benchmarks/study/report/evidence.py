"""Writes the pages of evidence from results, so that no number in them is typed in.

The pages are the templates in ``pages/`` (Jinja). They know every table of ``evidence.yaml`` by its name:
``{{ confirmation }}`` is all of it, ``{{ confirmation.dora["95 % interval"] }}`` one cell of one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError

from benchmarks.real_weights.evidence import draw_figures, page_parts
from benchmarks.study import StudyError
from benchmarks.study.report import evidence_mechanism, evidence_tables
from benchmarks.study.report.evidence_tables import Sources
from benchmarks.study.report.summary import Rows, markdown_table

KINDS = evidence_tables.KINDS | evidence_mechanism.KINDS
SPECIFICATION = Path(__file__).with_name("evidence.yaml")
PAGES = Path(__file__).with_name("pages")
STUDIES = Path(__file__).parents[1] / "studies"
DOCUMENTS = Path(__file__).parents[3] / "docs"


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
        return markdown_table(self.head, self.rows)

    def __getitem__(self, row: str) -> dict[str, str]:
        return {line[0]: dict(zip(self.head, line, strict=True)) for line in self.rows}[row]


def make_tables(sources: Sources, specification: Path = SPECIFICATION) -> dict[str, EvidenceTable]:
    """Every table that the specification names.

    Raises:
        StudyError: A kind does not exist.
    """
    tables = {}
    for name, options in yaml.safe_load(specification.read_text())["tables"].items():
        kind = options.pop("kind")
        if kind not in KINDS:
            raise StudyError(f"the table {name!r} is of the unknown kind {kind!r}; choose one of {', '.join(KINDS)}.")
        tables[name] = EvidenceTable(*KINDS[kind](sources, **options))
    return tables


def make_pages(tables: Mapping[str, EvidenceTable | str], templates: Path = PAGES) -> dict[str, str]:
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
            pages[file.name] = environment.get_template(file.name).render(tables)
        except UndefinedError as error:
            raise StudyError(f"the page {file.name} asks for what no table of evidence.yaml has: {error}.") from error
    return pages


def write_evidence(results: Iterable[dict[str, Any]], check: bool = False) -> bool:
    """Writes the pages into ``docs/``, and their figures into ``docs/figures/``.

    Args:
        results: All results.
        check: Write nothing.

    Returns:
        Whether the pages already said what the results say.
    """
    sources = Sources(results, STUDIES)
    pages = make_pages({**make_tables(sources), **page_parts()})
    same = all((file := DOCUMENTS / name).is_file() and file.read_text() == text for name, text in pages.items())
    if not check:
        from benchmarks.study.report.figures import draw_all

        for name, text in pages.items():
            (DOCUMENTS / name).write_text(text)
        draw_all(sources, DOCUMENTS / "figures")
        draw_figures(DOCUMENTS / "figures")
    return same
