"""CSV curves that go on: Lightning's writer deletes what a folder holds, and rewrites files in place."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from torch import Tensor
from typing_extensions import override

from na_lora_lightning.checkpoints.files import replace_file
from na_lora_lightning.lightning_internals import require_csv_writer


class ContinuedWriter(ExperimentWriter):
    """Appends to the ``metrics.csv`` of a folder, so that a kill at any moment leaves what was saved.

    Args:
        log_dir: Folder of the run.
    """

    def __init__(self, log_dir: str) -> None:
        require_csv_writer()
        super().__init__(log_dir)
        self._path = Path(self.metrics_file_path)
        self._earlier: set[frozenset[tuple[str, str]]] = set()
        if self._path.is_file():
            self._keep([row for row in self._rows() if row.get("step")])

    def discard_from(self, step: int) -> None:
        """Drops the rows of this step and later ones, which an interrupted run had written."""
        if self._path.is_file():
            self._keep([row for row in self._rows() if float(row["step"]) < step])

    @override
    def log_metrics(self, metrics_dict: dict[str, Any], step: int | None = None) -> None:
        """Takes a row, unless the file has it from before an interruption."""
        super().log_metrics(metrics_dict, step)
        if _identity(self.metrics[-1]) in self._earlier:
            self.metrics.pop()

    @override
    def _check_log_dir_exists(self) -> None:
        """Deletes nothing."""

    @override
    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._write(fieldnames, self._rows())

    def _rows(self) -> list[dict[str, str]]:
        text = self._path.read_text(encoding="utf-8")
        # The last line may be half of one.
        return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))

    def _keep(self, rows: list[dict[str, str]]) -> None:
        fieldnames = list(rows[0]) if rows else []
        self.metrics_keys = fieldnames
        self._earlier = {_identity(row) for row in rows}
        if rows:
            self._write(fieldnames, rows)
        else:
            self._path.unlink()

    def _write(self, fieldnames: list[str], rows: list[dict[str, str]]) -> None:
        content = io.StringIO(newline="")
        writer = csv.DictWriter(content, fieldnames=fieldnames)
        writer.writeheader()
        writer.writerows(rows)
        replace_file(self._path, content.getvalue().encode())


def _identity(row: dict[str, Any]) -> frozenset[tuple[str, str]]:
    values = {name: value.item() if isinstance(value, Tensor) else value for name, value in row.items()}
    return frozenset((name, str(value)) for name, value in values.items() if value not in ("", None))
