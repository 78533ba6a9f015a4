"""The images of the records of a split: how many there are, which files are missing, and reading them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
from datasets import Dataset
from PIL import Image

from na_lora_lightning.data.files.sources import local_path, separate_split
from na_lora_lightning.data.files.streams import is_list_of_images, undecoded
from na_lora_lightning.data.image_reading import ImageReader, content_of
from na_lora_lightning.errors import DataError, ImageError

IMAGE_COLUMNS = ("images", "image")
_ROWS_AT_ONCE = 1000


class RecordImages:
    """The images of the records of a split, which are decoded when they are asked for.

    A record has its images in the column ``images``, a list, or ``image``, one; without either it has none.

    Args:
        records: The records.
        source: The name of the data, for messages.
        reader: What to read images with.
        numbers: The places that the records have in the data, by which they are asked for; None where these are all.

    Raises:
        DataError: The data has no such column.
    """

    def __init__(
        self, records: Dataset, source: str, reader: ImageReader, numbers: Sequence[int] | None = None
    ) -> None:
        self.columns = [name for name in IMAGE_COLUMNS if name in records.column_names]
        if not self.columns:
            present = ", ".join(repr(name) for name in records.column_names)
            raise DataError(
                f"the data {source!r} has no column 'image' or 'images' (its columns are {present}); name one so with "
                "the option columns."
            )
        self.source = source
        self.reader = reader
        self._numbers = range(len(records)) if numbers is None else numbers
        self._rows = {number: row for row, number in enumerate(self._numbers)}
        self._records = undecoded(records.select_columns(self.columns))

    def survey(self) -> tuple[list[int], dict[int, str]]:
        """Counts the images of each record and looks for their files, without opening any.

        Returns:
            The numbers of images, and for the place of each record with a missing file the reason, as a sentence
            without its remedy of leaving the record out.
        """
        counts = [0] * len(self._records)
        missing: dict[int, str] = {}
        for name in reversed(self.columns):
            for row, paths in enumerate(_paths(self._records, name)):
                if paths is None:
                    continue
                index = self._numbers[row]
                counts[row] = len(paths)
                missing.pop(index, None)
                for path in paths:
                    reason = None if path is None else self.reader.reason_to_miss(path)
                    if reason is not None:
                        missing.setdefault(index, f"{self.name_of(index)} {reason}")
        return counts, missing

    def read(self, index: int, count: int) -> list[Image.Image]:
        """Decodes the first images of a record.

        Args:
            index: The place of the record in the data.
            count: How many images.

        Raises:
            ImageError: One of them cannot be used; the message names the record.
        """
        values = images_of(self._records[self._rows[index]])
        return read_images(values[:count], self.reader, self.name_of(index))

    def name_of(self, index: int) -> str:
        """What a record is called in messages."""
        return name_of_record(index, self.source)


def images_of(record: Mapping[str, Any]) -> list[Any]:
    """The images of a record as its data has them."""
    return next((_as_list(record[name]) for name in IMAGE_COLUMNS if record.get(name) is not None), [])


def read_images(values: Sequence[Any], reader: ImageReader, name: str) -> list[Image.Image]:
    """Decodes images of a record.

    Args:
        values: The images as the data has them.
        reader: What to read them with.
        name: What the record is called.

    Raises:
        ImageError: One of them cannot be used.
    """
    try:
        return [reader.read(value, number) for number, value in enumerate(values, start=1)]
    except ImageError as error:
        raise ImageError(f"{name} {error}") from error.__cause__


def name_of_record(index: int, source: str) -> str:
    """What a record is called in messages, by its place in the data."""
    return f"record {index + 1} of {source!r}"


def folder_of(source: str) -> Path:
    """Where relative paths of a source begin: the folder that it is, or the one that its file is in."""
    path = local_path(separate_split(source)[0])
    if path.is_dir():
        return path
    return path.parent if path.is_file() else Path()


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _paths(records: Dataset, name: str) -> Iterator[list[str | None] | None]:
    """The paths of the images of each record; None in place of one that is in the data, or of a whole empty cell."""
    feature = records.features[name]
    is_list = is_list_of_images(feature)
    if not is_list and not isinstance(feature, datasets.Image):
        for value in records[name]:
            yield None if value is None else [_path(entry) for entry in _as_list(value)]
        return
    # Images that are in the data need not be read to be counted, and can be many gigabytes.
    for table in records.select_columns([name]).with_format("arrow").iter(_ROWS_AT_ONCE):
        column = table[name].combine_chunks()
        lengths = (
            pc.list_value_length(column).to_pylist()
            if is_list
            else [1 if v else None for v in pc.is_valid(column).to_pylist()]
        )
        entries = pc.list_flatten(column) if is_list else column.drop_null()
        embedded = pc.is_valid(pc.struct_field(entries, "bytes")).to_pylist()
        paths = pc.struct_field(entries, "path").to_pylist()
        remaining = iter(
            [None if is_embedded else path or "" for is_embedded, path in zip(embedded, paths, strict=True)]
        )
        for length in lengths:
            yield None if length is None else [next(remaining) for _ in range(length)]


def _path(entry: Any) -> str | None:
    try:
        content = content_of(entry)
    except ImageError:
        # The record is named when it is read.
        return None
    return content if isinstance(content, str) else None
