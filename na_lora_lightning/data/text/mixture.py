"""The sources of a split: one or several, each with its own format, drawn from by weight or taken whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any, Literal

import numpy as np
from datasets import Dataset, concatenate_datasets, interleave_datasets
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from na_lora_lightning.data.options import TextOptions, require_known_columns
from na_lora_lightning.data.text.formats import format_named
from na_lora_lightning.errors import ConfigurationError, DataError

StoppingStrategy = Literal["first_exhausted", "all_exhausted"]
# The column that says which source a record is of.
PART = "part"


@dataclass(frozen=True)
class Source:
    """One source of records.

    Attributes:
        path: A file, a folder or a hub name, with the name of a split after it or not.
        weight: How often it is drawn from beside the others; None where all of its records are taken.
        format: What its records are; None to tell by its columns.
        columns: The names that it has for the columns of its format.
        dataset_config: The configuration of a hub data set that has several.
    """

    path: str
    weight: float | None = None
    format: str | None = None
    columns: dict[str, str] | None = None
    dataset_config: str | None = None


_KEYS = tuple(key.name for key in fields(Source))


def read_sources(value: Any, split: str, options: TextOptions, known_columns: Sequence[str]) -> list[Source]:
    """The sources that an option names.

    Args:
        value: A name, or a list of names and of dictionaries with the attributes of sources.
        split: Which split they are of.
        options: Those that hold for sources that say nothing else.
        known_columns: The columns that can be mapped.

    Raises:
        ConfigurationError: It names none, or one says something that cannot be.
    """
    common: dict[str, Any] = {
        "format": options.format,
        "columns": options.columns,
        "dataset_config": options.dataset_config,
    }
    given = value if isinstance(value, (list, tuple)) else [value]
    if not given:
        raise ConfigurationError(f"data.{split} is an empty list; name at least one source.")
    sources = []
    for entry in given:
        keys = dict(entry) if isinstance(entry, Mapping) else {"path": entry}
        unknown = sorted(set(keys) - set(_KEYS))
        if unknown or not isinstance(keys.get("path"), (str, PathLike)):
            problem = f"the unknown key {unknown[0]!r}" if unknown else "no path"
            raise ConfigurationError(
                f"a source of data.{split} has {problem}; give a name, or {', '.join(_KEYS[:-1])} and {_KEYS[-1]}."
            )
        keys["path"] = str(keys["path"])
        source = Source(**{**common, **{key: each for key, each in keys.items() if each is not None}})
        require_known_columns(source.columns, known_columns)
        if source.format is not None:
            format_named(source.format)
        is_number = isinstance(source.weight, (int, float))
        if source.weight is not None and not (is_number and 0 < source.weight < math.inf):
            raise ConfigurationError(f"the weight of {source.path!r} is {source.weight}; give a positive number.")
        sources.append(source)
    weighted = [source for source in sources if source.weight is not None]
    if weighted and split != "train":
        raise ConfigurationError(
            f"data.{split} has a source with a weight, which data.train alone can have; remove it."
        )
    if weighted and len(weighted) < len(sources):
        missing = next(source.path for source in sources if source.weight is None)
        raise ConfigurationError(f"the source {missing!r} has no weight and others have; give one to all or to none.")
    return sources


def probabilities(sources: Sequence[Source]) -> list[float] | None:
    """How often each source is drawn from; None where all are taken whole."""
    weights = [float(source.weight) for source in sources if source.weight is not None]
    return [weight / sum(weights) for weight in weights] if weights else None


def mix(
    parts: Sequence[Dataset],
    sources: Sequence[Source],
    *,
    seed: int,
    shuffle: bool,
    stopping_strategy: StoppingStrategy,
) -> Dataset:
    """One data set of several, by ``datasets.interleave_datasets`` where they have weights.

    Args:
        parts: The records of each source.
        sources: The sources.
        seed: What is drawn depends on it.
        shuffle: Whether the records of a source that is not taken whole are any of it, rather than its first ones.
        stopping_strategy: Whether drawing ends when the first source has no more records, or when all have been
            through, the others repeating theirs.
    """
    if len(parts) == 1:
        return parts[0]
    numbered = [part.add_column(PART, np.full(len(part), place, dtype=np.int32)) for place, part in enumerate(parts)]
    shares = probabilities(sources)
    if shares is None:
        return concatenate_datasets(numbered)
    if shuffle:
        numbered = [part.shuffle(seed=seed) for part in numbered]
    mixed = interleave_datasets(numbered, probabilities=shares, seed=seed, stopping_strategy=stopping_strategy)
    drawn = np.bincount(mixed.with_format("numpy")[PART][:], minlength=len(parts))
    counts = (
        f"{count} from the {len(part)} records of {source.path!r} (weight {source.weight:g})"
        for count, part, source in zip(drawn, parts, sources, strict=True)
    )
    rank_zero_info(f"The training data of an epoch are {' and '.join(counts)}.")
    return mixed


def share_for(split: str, count: int, fraction: float, seed: int, source: str) -> list[int]:
    """The places of the records that training or validation has where a share of the data is kept for validation.

    Args:
        split: ``train`` or ``validation``.
        count: How many records there are.
        fraction: The share for validation.
        seed: Which ones these are depends on it.
        source: The name of the data, for messages.

    Raises:
        DataError: One of the two would have none.
    """
    numbers = Dataset.from_dict({"number": range(count)})
    try:
        parts = numbers.train_test_split(test_size=fraction, seed=seed)
    except ValueError as error:
        raise DataError(
            f"the data {source!r} has {count} {'record' if count == 1 else 'records'}, of which validation_fraction="
            f"{fraction} leaves none to train on; lower it, or give data.validation."
        ) from error
    return sorted(parts["train" if split == "train" else "test"]["number"])
