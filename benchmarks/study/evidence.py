"""Fills the tables and numbers of a document from result files, so that none of them is typed in.

A table stands between ``<!-- table: NAME -->`` and ``<!-- /table -->``, where NAME is an entry of ``evidence.yaml``. A
number in a sentence stands between ``<!--= NAME | ROW | COLUMN -->`` and ``<!--/-->`` and is the cell of that table in
the row that begins with ROW.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study import evidence_mechanism, evidence_tables
from benchmarks.study.errors import StudyError
from benchmarks.study.evidence_tables import Found, Sources
from benchmarks.study.report import markdown_table

KINDS = evidence_tables.KINDS | evidence_mechanism.KINDS
SPECIFICATION = Path(__file__).with_name("evidence.yaml")
DOCUMENT = Path(__file__).parents[2] / "docs" / "evidence.md"
_TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
_NUMBER = re.compile(r"(<!--= ([\w-]+) \| ([^|]+?) \| (.+?) -->).*?(<!--/-->)", re.DOTALL)


def make_tables(results: Iterable[dict[str, Any]], specification: Path = SPECIFICATION) -> dict[str, Found]:
    """Head and rows of every table that the specification names.

    Raises:
        StudyError: A kind does not exist.
    """
    given = yaml.safe_load(specification.read_text())
    sources = Sources(results, specification.parent)
    tables = {}
    for name, options in given["tables"].items():
        kind = options.pop("kind")
        if kind not in KINDS:
            raise StudyError(f"the table {name!r} is of the unknown kind {kind!r}; choose one of {', '.join(KINDS)}.")
        tables[name] = KINDS[kind](sources, **options)
    return tables


def number(tables: Mapping[str, Found], name: str, row: str, column: str) -> str:
    """One cell of a table.

    Raises:
        StudyError: There is no such table, row or column.
    """
    if name not in tables:
        raise StudyError(f"the document asks for the table {name!r}; add it to evidence.yaml.")
    head, rows = tables[name]
    found = [line for line in rows if line[0] == row]
    if len(found) != 1 or column not in head:
        raise StudyError(
            f"the document asks for {column!r} of {row!r} in the table {name!r}, which has the columns "
            f"{', '.join(head)} and {len(found)} such rows."
        )
    return found[0][head.index(column)]


def filled(text: str, tables: Mapping[str, Found]) -> str:
    """The document with its tables and numbers filled in anew.

    Raises:
        StudyError: It asks for something that no table has.
    """

    def table(match: re.Match[str]) -> str:
        if match[2] not in tables:
            raise StudyError(f"the document asks for the table {match[2]!r}; add it to evidence.yaml.")
        return f"{match[1]}\n{markdown_table(*tables[match[2]])}\n\n{match[3]}"

    text = _TABLE.sub(table, text)
    return _NUMBER.sub(lambda match: match[1] + number(tables, match[2], match[3], match[4]) + match[5], text)


def write_evidence(
    results: Iterable[dict[str, Any]], document: Path = DOCUMENT, check: bool = False, figures: bool = True
) -> bool:
    """Fills the document, and draws its figures into ``figures/`` beside it.

    Args:
        results: All results.
        document: Markdown file.
        check: Change nothing.
        figures: Draw the figures too; they need matplotlib.

    Returns:
        Whether the document already said what the results say.
    """
    results = list(results)
    before = document.read_text()
    after = filled(before, make_tables(results))
    if not check:
        document.write_text(after)
        if figures:
            from benchmarks.study.evidence_figures import draw_all

            draw_all(Sources(results, SPECIFICATION.parent), document.parent / "figures")
    return after == before
