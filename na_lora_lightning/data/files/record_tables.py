"""Tables of records: files converted once to Arrow, which is then mapped into memory, and splits of them."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, Features, ReadInstruction

from na_lora_lightning.data.revision import code_revision

# A value for each column that a record has.
Row = dict[str, str | int | None]
Rows = Iterator[Row]
# The columns and batches of rows, read from files and the names of the columns that matter.
Table = tuple[Features, Iterator[pa.RecordBatch]]
Reader = Callable[[list[Path], frozenset[str]], Table]

_ROWS_AT_ONCE = 1000
_CHARACTERS_AT_ONCE = 1 << 24


def cache_folder(*identity: Any) -> Path:
    """A folder for what is made of some files by this version of the code."""
    key = hashlib.sha256(repr((identity, code_revision())).encode(errors="surrogatepass")).hexdigest()
    return Path(datasets.config.HF_DATASETS_CACHE) / "na_lora_records" / key[:32]


def read_table(paths: list[Path], read: Reader, names: frozenset[str]) -> Dataset:
    """Converts files to a table, or takes the one that was made of the same files before.

    Args:
        paths: The files.
        read: How they are read.
        names: The columns that matter.

    Raises:
        DataError: A file is malformed.
        OSError: A file cannot be read, or the cache cannot be written.
    """
    folder = cache_folder(read.__name__, sorted(names), [_identity(path) for path in paths])
    table = folder / "records.arrow"
    if not table.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        # Other processes may do the same at the same time.
        handle, name = tempfile.mkstemp(dir=folder, suffix=".incomplete")
        try:
            with os.fdopen(handle, "wb") as file:
                features, batches = read(paths, names)
                with pa.ipc.new_stream(file, features.arrow_schema) as writer:
                    for batch in batches:
                        writer.write_batch(batch)
            os.replace(name, table)
        finally:
            Path(name).unlink(missing_ok=True)
    return Dataset.from_file(str(table))


def batches_of(rows: Rows, features: Features) -> Table:
    """Makes batches of rows."""
    return features, _batches(rows, features.arrow_schema)


class Splits(Mapping[str, int]):
    """The splits of a data set, of which none is loaded before it is asked for.

    Args:
        load: Loads a split.
        names: What they are called.
    """

    def __init__(self, load: Callable[[str], Dataset], names: list[str]) -> None:
        self._load = load
        self._names = names
        self._loaded: dict[str, Dataset] = {}

    def __getitem__(self, name: str) -> int:
        if name not in self._names:
            raise KeyError(name)
        return len(self.table(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def table(self, name: str) -> Dataset:
        """A whole split."""
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def select(self, instruction: str) -> Dataset:
        """What an instruction such as ``train[:90%]`` says.

        Raises:
            ValueError: There is no such split, or it is not an instruction.
        """
        if instruction in self._names:
            return self.table(instruction)
        parts = ReadInstruction.from_spec(instruction).to_absolute(self)
        tables = [self.table(part.splitname).select(range(part.from_, part.to)) for part in parts]
        return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)


def _identity(path: Path) -> tuple[Any, ...]:
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _batches(rows: Rows, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    batch: list[Row] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(batch) == _ROWS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield pa.RecordBatch.from_pylist(batch, schema=schema)
            batch, characters = [], 0
    if batch:
        yield pa.RecordBatch.from_pylist(batch, schema=schema)
