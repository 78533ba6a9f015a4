"""CSV and TSV, read to the letter: every cell is text, and a row with other cells than the header is refused."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TextIO

from datasets import Features, Value

from na_lora_lightning.data.files.record_tables import Rows, Table, batches_of, kind_of, open_text
from na_lora_lightning.errors import DataError

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
# What the errors of the module mean to those who made the file.
_REASONS = {
    "unexpected end of data": "a double quote is not closed",
    "expected after": "something follows a closing double quote",
    "new-line character": "a line break is not in double quotes",
}
_LONGEST_CELL = 2**31 - 1


def read_csv(paths: list[Path], names: frozenset[str]) -> Table:
    """Reads files whose first row has the names of the columns.

    Args:
        paths: The files; those named ``.tsv`` or ``.tsv.gz`` are separated by tabs, in others the header tells.
        names: The columns that matter, by which a header is known.

    Returns:
        The columns and the rows.

    Raises:
        DataError: A file is malformed; the message names the line.
    """
    columns: dict[str, Value] = {}
    for path in paths:
        with _opened(path, names) as table:
            columns |= {name: Value("string") for name in table.columns if name}

    return batches_of(csv_records(paths, names), Features(columns))


def csv_records(paths: list[Path], names: frozenset[str]) -> Rows:
    """Reads the same files one record after another."""
    for path in paths:
        with _opened(path, names) as table:
            yield from table.records()


class _Table:
    """An open file, its header read."""

    def __init__(self, path: Path, file: TextIO, names: frozenset[str]) -> None:
        self.path = path
        lines = iter(file.readline, "")
        # How many lines come before those that the reader counts.
        self.skipped = 0
        first = ""
        for first in lines:
            if first.strip(" \r\n"):
                break
            self.skipped += 1
        delimiters = ["\t"] if kind_of(path) == ".tsv" else list(_DELIMITERS)
        if first.lower().startswith("sep=") and first[4:5] in _DELIMITERS:
            # Excel's way to tell.
            delimiters, first = [first[4]], next(lines, "")
            self.skipped += 1
        self.delimiter = max(delimiters, key=lambda delimiter: _fitness(first, delimiter, names))
        self.reader = csv.reader(chain([first], lines), delimiter=self.delimiter, strict=True)
        header = [cell.strip() for cell in next(self.read_rows(), [])]
        if not any(header):
            raise DataError(f"the file {str(path)!r} has no header; put the names of its columns in its first line.")
        twice = {name for name in header if header.count(name) > 1}
        if twice & names:
            raise DataError(f"the file {str(path)!r} has the column {min(twice & names)!r} twice; rename one.")
        # Such columns, and that of pandas' row numbers, have no name of their own, and are left out.
        self.columns = ["" if name in twice else name for name in header]

    def records(self) -> Rows:
        line = self.next_line
        for cells in self.read_rows():
            if len(cells) == len(self.columns):
                yield {name: cell for name, cell in zip(self.columns, cells, strict=True) if name}
            elif len(cells) > 1 or any(cell.strip() for cell in cells):
                counted = f"{len(cells)} {'cell' if len(cells) == 1 else 'cells'}"
                raise DataError(
                    f"line {line} of {str(self.path)!r} has {counted} where the header has {len(self.columns)}; put "
                    f"text that has {_DELIMITERS[self.delimiter]} or line breaks in double quotes, or remove the line."
                )
            line = self.next_line

    @property
    def next_line(self) -> int:
        return self.skipped + self.reader.line_num + 1

    def read_rows(self) -> Iterator[list[str]]:
        while True:
            line = self.next_line
            try:
                cells = next(self.reader, None)
            except csv.Error as error:
                reason = next((reason for part, reason in _REASONS.items() if part in str(error)), str(error))
                raise DataError(
                    f"line {line} of {str(self.path)!r} is malformed ({reason}); put text with quotes or line breaks "
                    "in double quotes, and double the quotes inside."
                ) from error
            if cells is None:
                return
            yield cells


@contextmanager
def _opened(path: Path, names: frozenset[str]) -> Iterator[_Table]:
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        with open_text(path, newline=_line_end(path)) as file:
            yield _Table(path, file, names)
    finally:
        csv.field_size_limit(limit)


def _line_end(path: Path) -> str:
    """What ``open`` is to split lines at, which leaves their ends as they are."""
    with open_text(path, newline="") as file:
        first = next((line for line in iter(file.readline, "") if line.strip(" \r\n")), "")
    # Where lines do not end with it, a lone carriage return is part of a cell.
    return "" if first.endswith("\r") else "\n"


def _fitness(header: str, delimiter: str, names: frozenset[str]) -> tuple[int, int]:
    """How many names that matter a header has with a delimiter, and how many names."""
    cells = [cell.strip() for cell in next(csv.reader([header], delimiter=delimiter), [])]
    return len(names & set(cells)), len(cells)
