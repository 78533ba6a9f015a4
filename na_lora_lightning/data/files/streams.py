"""Records one after another as they are read, without a table of them all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Image, LargeList, List, load_dataset

from na_lora_lightning.data.files.csv_files import csv_records, read_csv
from na_lora_lightning.data.files.json_files import json_records, read_json
from na_lora_lightning.data.files.parquet_files import read_parquet
from na_lora_lightning.data.files.record_tables import Reader
from na_lora_lightning.data.files.sources import (
    COLUMNS,
    explained,
    files_of_folder,
    find_source,
    load_records,
    reader_of,
    require_columns,
    separate_split,
)
from na_lora_lightning.errors import DataError

Record = dict[str, Any]
Records = Iterator[Record]


def stream_records(
    source: str, *, default_split: str, config: str | None = None, columns: dict[str, str] | None = None
) -> Callable[[], Records]:
    """What reads the records of one split from the first to the last, each time that it is called.

    Args:
        source: A file, a folder or a hub name, with the name of a split after it or not.
        default_split: The split of a folder or a hub data set when ``source`` names none.
        config: The configuration of a hub data set that has several.
        columns: Names of the columns that are wanted, and the names that they have in the data.

    Raises:
        DataError: There is no such data, or it is a part of a split, which is known when all of it has been read.
    """
    name, split = separate_split(source)
    if split is not None and ("[" in split or "+" in split):
        raise DataError(
            f"the data {source!r} is a part of a split, which cannot be streamed; name a whole split, or set streaming "
            "to false."
        )
    names = COLUMNS | set((columns or {}).values())
    read: Callable[[], Records]
    with explained(source):
        kind, path = find_source(source, name)
        files = files_of_folder(path).get(split or default_split) if kind == "folder" else None
        if kind == "file" and split in (None, "train") and path.is_file() and path.stat().st_size:
            files = [path]
        if files and len({reader_of(file) for file in files}) == 1 and reader_of(files[0]) is not None:
            read = partial(_of_files, files, names)
        elif kind == "hub":
            streamed = load_dataset(path=name, name=config, split=split or default_split, streaming=True)
            read = partial(_of_table, undecoded(streamed))
        else:
            # Saved data, which are a table already, and whatever is wrong with the name.
            saved = load_records(source, default_split=default_split, config=config)
            read = partial(_of_table, undecoded(saved))
    return partial(_renamed, read, source, columns or {})


def undecoded(records: Any) -> Any:
    """Records of ``datasets`` whose images stay the bytes or paths that they are."""
    for name, feature in (records.features or {}).items():
        if isinstance(feature, Image):
            records = records.cast_column(name, Image(decode=False))
        elif is_list_of_images(feature):
            records = records.cast_column(name, type(feature)(Image(decode=False)))
    return records


def is_list_of_images(feature: Any) -> bool:
    """Whether a column of ``datasets`` has several images for each record."""
    return isinstance(getattr(feature, "feature", None), Image)


def without_filling(value: Any, feature: Any) -> Any:
    """Removes the keys that only other records have, which a struct of Arrow fills with None."""
    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: without_filling(item, feature[key]) for key, item in value.items() if item is not None}
    if isinstance(feature, (List, LargeList)) and isinstance(value, list):
        return [without_filling(item, feature.feature) for item in value]
    return value


def _of_files(paths: list[Path], names: frozenset[str]) -> Records:
    yield from _RECORDS[reader_of(paths[0])](paths, names)


def _parquet_records(paths: list[Path], names: frozenset[str]) -> Records:
    features, batches = read_parquet(paths, names)
    for batch in batches:
        for record in batch.to_pylist():
            yield {key: without_filling(value, features[key]) for key, value in record.items()}


_RECORDS: dict[Reader | None, Callable[[list[Path], frozenset[str]], Records]] = {
    read_json: json_records,
    read_csv: csv_records,
    read_parquet: _parquet_records,
}


def _of_table(records: Any) -> Records:
    for record in records:
        yield {key: without_filling(value, (records.features or {}).get(key)) for key, value in record.items()}


def _renamed(read: Callable[[], Records], source: str, columns: dict[str, str]) -> Records:
    new_names = {own: wanted for wanted, own in columns.items()}
    with explained(source):
        for number, record in enumerate(read()):
            if number == 0:
                require_columns(list(record), source, columns)
            yield {
                new_names.get(key, key): value
                for key, value in record.items()
                # A column that has a wanted name by chance would be in the way.
                if key in new_names or key not in columns
            }
