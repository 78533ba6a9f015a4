"""Tables of records: files read as text, converted once to Arrow, which is mapped into memory, and splits of them."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

import datasets
import pyarrow as pa
from datasets import Dataset, Features, ReadInstruction

from na_lora_lightning.errors import DataError

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


# The mark of UTF-32 begins with that of UTF-16. These codecs take the mark off.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@contextmanager
def open_text(path: Path, *, newline: str | None = None) -> Iterator[TextIO]:
    """Opens a text file, compressed with gzip or not, in UTF-8 or the encoding that its byte order mark tells.

    Args:
        path: The file; it is compressed if its name ends in ``.gz``.
        newline: As for the built-in ``open``.

    Raises:
        DataError: The file turns out to be in another encoding, or to be no gzip file.
    """
    encoding = "utf-8"
    try:
        encoding = _encoding_of(path)
        with io.TextIOWrapper(_open_binary(path), encoding=encoding, newline=newline) as file:
            yield file
    except UnicodeError as error:
        if isinstance(error, UnicodeEncodeError):
            raise
        raise _undecodable(path, encoding) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = str(error).rstrip(".")
        raise DataError(
            f"the file {str(path)!r} cannot be unpacked with gzip ({reason}); correct its name or copy it again."
        ) from error


def kind_of(path: Path) -> str:
    """What a file's name says about its form, in lower case: its last suffix, or the one before ``.gz``."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return (suffixes[:-1] or [""])[-1] if suffixes[-1:] == [".gz"] else (suffixes or [""])[-1]


def _open_binary(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb"))


def _encoding_of(path: Path) -> str:
    with _open_binary(path) as file:
        start = file.read(4)
    for mark, encoding in _MARKS:
        if start.startswith(mark):
            return encoding
    # Records begin with a character of ASCII, of which UTF-16 makes two bytes, one of them zero.
    if len(start) == 4 and start[1] == start[3] == 0 != start[0]:
        return "utf-16-le"
    if len(start) == 4 and start[0] == start[2] == 0 != start[1]:
        return "utf-16-be"
    return "utf-8"


def _undecodable(path: Path, encoding: str) -> DataError:
    where, remedy = f"the file {str(path)!r}", "save it as UTF-8 (in Excel: 'CSV UTF-8')"
    if not encoding.startswith("utf-8"):
        return DataError(f"{where} begins like {encoding[:6].upper()} and is not; {remedy}.")
    with _open_binary(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                position = f"byte 0x{line[error.start]:02x} at position {error.start + 1} of line {number}"
                return DataError(f"{where} is not in UTF-8 ({position}); {remedy}.")
    return DataError(f"{where} is not in UTF-8; {remedy}.")


@cache
def code_revision() -> str:
    """A hash of the source of all data modules, under which results are cached; those of other code are not reused."""
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
