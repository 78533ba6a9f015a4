"""Parquet, with the types that its files say; what ``datasets`` has no type for is left out unless it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features

from na_lora_lightning.data.files.record_tables import Table
from na_lora_lightning.errors import DataError

_ROWS_AT_ONCE = 1000


def read_parquet(paths: list[Path], names: frozenset[str]) -> Table:
    """Reads Parquet files.

    Args:
        paths: The files.
        names: The columns that are needed where a file has them.

    Returns:
        The columns and the rows.

    Raises:
        DataError: A column that is needed cannot be read.
    """
    features: dict[str, Any] = {}
    for path in paths:
        features = {**_features(path, names), **features}
    schema = Features(features).arrow_schema

    def batches() -> Iterator[pa.RecordBatch]:
        for path in paths:
            with pq.ParquetFile(path) as file:
                own = [name for name in schema.names if name in file.schema_arrow.names]
                for batch in file.iter_batches(_ROWS_AT_ONCE, columns=own):
                    # Text that is none would be found when it is too late.
                    batch.validate(full=True)
                    yield pa.RecordBatch.from_arrays([_column(batch, field) for field in schema], schema=schema)

    return Features(features), batches()


def _column(batch: pa.RecordBatch, field: pa.Field) -> pa.Array:
    if field.name not in batch.schema.names:
        return pa.nulls(len(batch), field.type)
    column = batch.column(field.name)
    if column.type == field.type:
        return column
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    return (
        column.dictionary_decode().cast(field.type) if pa.types.is_dictionary(column.type) else column.cast(field.type)
    )


def _features(path: Path, names: frozenset[str]) -> dict[str, Any]:
    features: dict[str, Any] = {}
    schema = pq.read_schema(path)
    for field in schema:
        try:
            if schema.names.count(field.name) > 1:
                raise ValueError("it is there twice")
            plain = pa.schema([field.with_type(_plain_type(field.type))], metadata=schema.metadata)
            features |= dict(Features.from_arrow_schema(plain))
        except (ValueError, NotImplementedError, TypeError) as error:
            if field.name in names:
                reason = str(error).partition("\n")[0].rstrip(".")
                raise DataError(
                    f"the column {field.name!r} of {str(path)!r} cannot be read ({reason}); save it with another type."
                ) from error
    return features


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return kind.value_type
    if isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.json":
        return kind.storage_type
    views = {"string_view": pa.string(), "binary_view": pa.binary()}
    return views.get(str(kind), kind)
