"""Reading records from files, saved folders and the Hugging Face hub."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from na_lora_lightning.errors import DataError

# These readers, unlike ``load_dataset``, do not report to the hub that a local file is read.
_READERS: dict[str, Callable[..., Dataset]] = {
    ".jsonl": Dataset.from_json,
    ".json": Dataset.from_json,
    ".csv": Dataset.from_csv,
    ".parquet": Dataset.from_parquet,
}
_SOURCE_WITH_SPLIT = re.compile(r"(?P<name>.+?):(?P<split>\w[\w.\-]*(\[[^\]]*\])?(\+.+)?)")


def load_records(
    source: str, *, default_split: str, config: str | None = None, columns: dict[str, str] | None = None
) -> Dataset:
    """Loads the records of one split.

    Args:
        source: A file, a folder or a hub name, with ``:split`` after it or not.
        default_split: The split of a folder or a hub data set when ``source`` names none.
        config: The configuration of a hub data set that has several.
        columns: Names of columns to be had, and the names in the data that they stand for.

    Raises:
        DataError: If the source does not exist, cannot be read, or has no records.
    """
    name, split = separate_split(source)
    path = Path(name).expanduser()
    if path.suffix in _READERS and not path.is_dir():
        records = _load_file(path, source, split)
    elif path.is_dir():
        records = _load_folder(path, source, split or default_split)
    elif name.startswith(("/", "./", "../", "~")) or path.exists():
        reason = "is not a .jsonl, .json, .csv or .parquet file" if path.exists() else "does not exist"
        raise DataError(f"The data {source!r} cannot be loaded because {name!r} {reason}; correct the path.")
    else:
        records = _load(load_dataset, source, path=name, name=config, split=split or default_split)
    if len(records) == 0:
        raise DataError(f"The data {source!r} has no records; give data with at least one record.")
    return _renamed(records, source, columns or {})


def _renamed(records: Dataset, source: str, columns: dict[str, str]) -> Dataset:
    for name in columns.values():
        if name not in records.column_names:
            present = ", ".join(repr(column) for column in records.column_names)
            raise DataError(
                f"The data {source!r} has no column {name!r} (its columns are {present}); correct the option columns."
            )
    # A column that has a wanted name by chance would be in the way.
    in_the_way = (set(columns) & set(records.column_names)) - set(columns.values())
    return records.remove_columns(sorted(in_the_way)).rename_columns(
        {name: wanted for wanted, name in columns.items() if name != wanted}
    )


def separate_split(source: str) -> tuple[str, str | None]:
    """Separates ``name:split``; an existing path is never taken apart."""
    matched = _SOURCE_WITH_SPLIT.fullmatch(source)
    if matched is None or Path(source).expanduser().exists():
        return source, None
    return matched["name"], matched["split"]


def _load_file(path: Path, source: str, split: str | None) -> Dataset:
    if not path.is_file():
        raise DataError(f"The data file {str(path)!r} does not exist; correct the path.")
    if path.stat().st_size == 0:
        raise DataError(f"The data file {str(path)!r} is empty; give a file with at least one record.")
    options: dict[str, Any] = {}
    if path.suffix == ".csv":
        # Answers such as 042 or None are text: no number and no missing value may be read into them.
        with path.open(newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file))
        options["features"] = Features({column: Value("string") for column in columns})
        options["keep_default_na"] = False
    files = {"train": str(path)}
    try:
        return _load(_READERS[path.suffix], source, path_or_paths=files, split=split or "train", **options)
    except DataError:
        if path.suffix == ".jsonl":
            _report_malformed_line(path)
        raise


def _load_folder(path: Path, source: str, split: str) -> Dataset:
    if not any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        return _load(load_dataset, source, path=str(path), split=split)
    # Tokenised records are cached beside the saved ones, unless the folder cannot be written to.
    saved = _load(load_from_disk, source, dataset_path=str(path), keep_in_memory=not os.access(path, os.W_OK))
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise DataError(
            f"The saved data {str(path)!r} has no split {split!r} (its splits are {', '.join(saved)}); "
            "add one of them to the name after a colon."
        )
    return saved[split]


def _load(load: Callable[..., Any], source: str, **arguments: Any) -> Any:
    """Calls a function of ``datasets`` and turns its many failures into one kind."""
    try:
        return load(**arguments)
    except (DatasetsError, IndexError, OSError, ValueError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0].rstrip(".")
        raise DataError(
            f"The data {source!r} cannot be loaded ({reason}); give a .jsonl, .json, .csv or .parquet file, "
            "a folder of a saved data set, or a name on the hub, with a split that it has."
        ) from error


def _report_malformed_line(path: Path) -> None:
    """Raises an error that names the first line that is no JSON object, if there is one."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                if not line.strip() or isinstance(json.loads(line), dict):
                    continue
                reason = "it is no JSON object"
            except json.JSONDecodeError as error:
                reason = f"{error.msg} at column {error.colno}"
            raise DataError(f"Line {number} of {str(path)!r} is malformed ({reason}); correct or remove it.")
