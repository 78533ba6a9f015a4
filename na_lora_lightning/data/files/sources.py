"""Reading records from files, saved folders and the Hugging Face hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from datasets import (
    Dataset,
    DatasetBuilder,
    DatasetDict,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetsError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from na_lora_lightning.data.files.csv_files import read_csv
from na_lora_lightning.data.files.json_files import read_json
from na_lora_lightning.data.files.parquet_files import read_parquet
from na_lora_lightning.data.files.record_tables import Reader, Splits, cache_folder, kind_of, read_table
from na_lora_lightning.errors import DataError

# Arrow and pandas guess types: these readers take what is written. An existing path is a path, never a pattern.
_READERS: dict[str, Reader] = {
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
_KINDS = f"{', '.join([*_READERS][:-1])} or {[*_READERS][-1]} file"
_SPLIT = re.compile(r"\w[\w.\-]*(\[[^\]]*\])?(\+.+)?")
_FAILURES = (DatasetsError, pa.ArrowException, LookupError, OSError, RuntimeError, TypeError, ValueError)
# What records are made of, by which a table is known to be one.
COLUMNS = frozenset(
    {"messages", "prompt", "completion", "tools", "system", "conversations", "text", "image", "images", "label"}
    | {"instruction", "input", "output", "history"}
)
# Where ``datasets`` looks for what is said about the images of a folder.
_LISTINGS = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_PATTERN_CHARACTERS = re.compile(r"[*?\[\]{}]|::")


def load_records(
    source: str, *, default_split: str, config: str | None = None, columns: dict[str, str] | None = None
) -> Dataset:
    """Loads the records of one split.

    Args:
        source: A file, a folder or a hub name, with ``:split`` after it or not.
        default_split: The split of a folder or a hub data set when ``source`` names none.
        config: The configuration of a hub data set that has several.
        columns: Names of the columns that are wanted, and the names that they have in the data.

    Raises:
        DataError: The source does not exist, cannot be read, or has no records.
    """
    name, split = separate_split(source)
    names = COLUMNS | set((columns or {}).values())
    with explained(source):
        kind, path = find_source(source, name)
        if kind == "folder":
            # ``datasets`` would take a folder whose name begins with ``~`` for somebody's home.
            records = _load_folder(path.absolute(), split or default_split, names)
        elif kind == "file":
            records = _load_file(path, split or "train", names)
        else:
            records = load_dataset(path=name, name=config, split=split or default_split)
    if len(records) == 0:
        raise DataError(f"the data {source!r} has no records; give data with at least one record.")
    return _renamed(records, source, columns or {})


def find_source(source: str, name: str) -> tuple[Literal["folder", "file", "hub"], Path]:
    """What a name stands for, and its path.

    Args:
        source: The name of the data, for messages.
        name: The name without that of a split.

    Raises:
        DataError: It stands for nothing that can be read.
    """
    path = local_path(name)
    if _exists(path) and path.is_dir():
        return "folder", path
    if reader_of(path) is not None and "://" not in name:
        return "file", path
    if _exists(path) or name.startswith(("/", "./", "../", "~")) or "://" in name:
        reason = f"is not a {_KINDS}" if _exists(path) else "does not exist"
        remedy = "correct the path"
        if "://" in name:
            reason, remedy = "is an address", "download it and give the path of the file"
        raise DataError(f"the data {source!r} cannot be loaded because {name!r} {reason}; {remedy}.")
    return "hub", path


def separate_split(source: str) -> tuple[str, str | None]:
    """Separates ``name:split``; an existing path is never taken apart."""
    if _exists(local_path(source)):
        return source, None
    parts = [
        (source[:place], source[place + 1 :])
        for place, character in enumerate(source)
        if character == ":" and place and _SPLIT.fullmatch(source[place + 1 :])
    ]
    if not parts:
        return source, None
    return next((part for part in reversed(parts) if _exists(local_path(part[0]))), parts[0])


def local_path(name: str) -> Path:
    """The path that a name stands for; ``~`` is the user's home unless there is something of that name."""
    path = Path(name)
    try:
        return path if _exists(path) else path.expanduser()
    except RuntimeError:
        # There is no such user.
        return path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        # It is too long, or has a character that no path has.
        return False


def _renamed(records: Dataset, source: str, columns: dict[str, str]) -> Dataset:
    require_columns(records.column_names, source, columns)
    # A column that has a wanted name by chance would be in the way.
    in_the_way = (set(columns) & set(records.column_names)) - set(columns.values())
    return records.remove_columns(sorted(in_the_way)).rename_columns(
        {name: wanted for wanted, name in columns.items() if name != wanted}
    )


def require_columns(present: list[str], source: str, columns: dict[str, str]) -> None:
    """Refuses data without a column that is wanted.

    Raises:
        DataError: It lacks one.
    """
    for name in columns.values():
        if name not in present:
            shown = ", ".join(repr(column) for column in present)
            raise DataError(
                f"the data {source!r} has no column {name!r} (its columns are {shown}); correct the option columns."
            )


def _load_file(path: Path, split: str, names: frozenset[str]) -> Dataset:
    if not (_exists(path) and path.is_file()):
        raise DataError(f"the data file {str(path)!r} does not exist; correct the path.")
    if path.stat().st_size == 0:
        raise DataError(f"the data file {str(path)!r} is empty; give a file with at least one record.")
    return Splits(lambda _: _read([path], names), ["train"]).select(split)


def _read(paths: list[Path], names: frozenset[str]) -> Dataset:
    reader = reader_of(paths[0])
    assert reader is not None
    return read_table(paths, reader, names)


def reader_of(path: Path) -> Reader | None:
    """How a file is read; None if it is of no kind that is known."""
    kind = kind_of(path)
    # Parquet is compressed inside.
    return None if kind == ".parquet" != path.suffix.lower() else _READERS.get(kind)


def _load_folder(path: Path, split: str, names: frozenset[str]) -> Dataset:
    if not _is_saved(path):
        return _load_files_of(path, split, names)
    # Tokenised records are cached beside the saved ones, unless the folder cannot be written to.
    saved = load_from_disk(dataset_path=str(path), keep_in_memory=not os.access(path, os.W_OK))
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise DataError(
            f"the saved data {str(path)!r} has no split {split!r} (its splits are {', '.join(saved)}); "
            "add one of them to the name after a colon."
        )
    return saved[split]


def _load_files_of(path: Path, split: str, names: frozenset[str]) -> Dataset:
    """Loads a folder of files, of which ``datasets`` tells the splits."""
    path = _readable_name(path)
    builder = load_dataset_builder(path=str(path))
    files = _files_of(builder)
    listings = {name: [file for file in listed if file.name in _LISTINGS] for name, listed in files.items()}
    if isinstance(builder, ImageFolder) and all(listings.values()):
        return Splits(lambda name: _read_listings(listings[name], names), list(files)).select(split)
    readers = {reader_of(file) for listed in files.values() for file in listed}
    if None in readers or len(readers) != 1:
        # Images, and whatever else ``datasets`` knows.
        return load_dataset(path=str(path), split=split)
    return Splits(lambda name: _read(files[name], names), list(files)).select(split)


def files_of_folder(path: Path) -> dict[str, list[Path]]:
    """The files of each split of a folder, of which ``datasets`` tells the splits; none of a saved data set."""
    return {} if _is_saved(path) else _files_of(load_dataset_builder(path=str(_readable_name(path.absolute()))))


def _is_saved(path: Path) -> bool:
    return any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json"))


def _files_of(builder: DatasetBuilder) -> dict[str, list[Path]]:
    return {str(name): [Path(file) for file in listed] for name, listed in (builder.config.data_files or {}).items()}


def _read_listings(paths: list[Path], names: frozenset[str]) -> Dataset:
    """Reads what is said about the images of a folder, whose paths become those of files."""
    tables = []
    for path in paths:
        table = _read([path], names)
        for listed in table.column_names:
            kind = re.fullmatch(r"(.*_)?file_name(s?)", listed)
            if kind is not None:
                place = (kind[1] or "image_")[:-1] + ("" if kind[1] else kind[2])
                values = [_in_folder(path.parent, value) for value in table[listed]]
                table = table.remove_columns(listed).add_column(place, values)
        tables.append(table)
    return concatenate_datasets(tables)


def _in_folder(folder: Path, name: Any) -> Any:
    if isinstance(name, list):
        return [_in_folder(folder, each) for each in name]
    return None if name is None else str(folder / str(name))


def _readable_name(path: Path) -> Path:
    """A folder that ``datasets`` reads as the one given, whose names it would take for patterns or not know."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    renamed = [
        file.with_suffix(file.suffix.lower()) if reader_of(file) is not None else file
        for file in (file.relative_to(path) for file in files)
    ]
    if not _PATTERN_CHARACTERS.search(str(path.resolve())) and all(
        file.relative_to(path) == name for file, name in zip(files, renamed, strict=True)
    ):
        return path
    mirror = cache_folder(str(path.resolve())) / "files"
    for file, name in zip(files, renamed, strict=True):
        link = mirror / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(file.resolve())
    return mirror


@contextmanager
def explained(source: str) -> Iterator[None]:
    """Turns the many failures of libraries into one kind."""
    try:
        yield
    except DataError:
        raise
    except _FAILURES as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0].rstrip(".")
        raise DataError(
            f"the data {source!r} cannot be loaded ({reason}); give a {_KINDS}, a folder of a saved data set, or a "
            "name on the hub, with a split that it has."
        ) from error
