"""Tokenised splits, what they consist of, and the report of what was cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from datasets.fingerprint import Hasher
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from na_lora_lightning.data.files.streams import without_filling
from na_lora_lightning.data.text.encoding import RecordEncoder
from na_lora_lightning.data.text.formats import Format, recognise
from na_lora_lightning.errors import DataError

_MANY_TOKENS = 10_000


class TruncationWarning(UserWarning):
    """Some records are longer than the maximum length and have been cut."""


class LeftOutRecordsWarning(UserWarning):
    """Some records have been left out: their images are missing or broken, or they are longer than is allowed."""


@dataclass(frozen=True)
class SplitSummary:
    """What a split consists of after tokenisation.

    Attributes:
        records: The number of records.
        tokens: The number of tokens of all records, without padding.
        target_tokens: The number of tokens that the loss is computed on.
        truncated: The number of records that were cut to the maximum length.
    """

    records: int
    tokens: int
    target_tokens: int
    truncated: int

    @classmethod
    def of(cls, encoded: Dataset) -> SplitSummary:
        """Counts the records and tokens of an encoded split."""
        sums = {name: sum(encoded[name]) for name in ("tokens", "target_tokens", "truncated")}
        return cls(records=len(encoded), **sums)


def encode_split(
    records: Dataset,
    encoder: RecordEncoder,
    *,
    source: str,
    split: str,
    form: str | None = None,
    numbers: Sequence[int] | None = None,
    num_proc: int | None = None,
) -> Dataset:
    """Encodes all records of a split, or takes them from the cache of ``datasets``.

    Args:
        records: The records.
        encoder: What to encode them with.
        source: The name of the data, for messages.
        form: The name of their format; None to tell by their columns.
        split: Which one it is. What generation is scored with is added but for ``train``, and a record without
            completion is an error but for ``predict``.
        numbers: The places that the records have in the data; None where these are all of it.
        num_proc: The number of processes that share the records; None stands for this one alone.

    Raises:
        DataError: A record cannot be used.
    """
    evaluation, needs_completion = split != "train", split != "predict"
    known = recognise(records.column_names, source, form, needs_completion=needs_completion)
    report_format(known, records.column_names, source)
    options = {
        "features": records.features,
        "source": source,
        "evaluation": evaluation,
        "needs_completion": needs_completion,
        "form": known,
        "numbers": None if numbers is None else np.asarray(numbers),
    }
    encoded = records.map(
        _encode,
        with_indices=True,
        fn_kwargs={"encoder": encoder, **options},
        new_fingerprint=_fingerprint(records, encoder, options),
        remove_columns=records.column_names,
        features=encoder.features(evaluation=evaluation),
        # A process without records is none.
        num_proc=None if num_proc is None else max(1, min(num_proc, len(records))),
        desc="Tokenising",
    )
    return _without_long(encoded, encoder, source)


def _fingerprint(records: Dataset, encoder: RecordEncoder, options: dict[str, Any]) -> str:
    """A hash of all that encoded records depend on, under which they are cached."""
    light = copy(encoder)
    light.template = copy(encoder.template)
    light.tokenizer = light.template.tokenizer = _said_of(encoder.tokenizer)
    return Hasher.hash((records._fingerprint, light, options))


def _said_of(tokenizer: Any) -> Any:
    """A tokenizer for :class:`Hasher`, which takes six seconds for each of 262,144 tokens as objects of Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer
    # What is as long as a vocabulary is one, or its merges, which the backend has too.
    rest = {
        name: value
        for name, value in vars(tokenizer).items()
        if value is not backend and not (isinstance(value, dict | list) and len(value) > _MANY_TOKENS)
    }
    return type(tokenizer), backend.to_str(), rest


def _without_long(encoded: Dataset, encoder: RecordEncoder, source: str) -> Dataset:
    """Reports the records that are too long, and takes them out if they are to be left out."""
    is_long = encoded["truncated"][:]
    if not any(is_long):
        return encoded
    are_too_long = (
        f"{sum(is_long)} of {len(encoded)} records of {source!r} have more tokens than max_length={encoder.max_length}"
    )
    remedy = "raise max_length or shorten them."
    if encoder.too_long == "truncate":
        rank_zero_warn(f"{are_too_long} and were cut; {remedy}", category=TruncationWarning)
        return encoded
    if all(is_long):
        raise DataError(f"{are_too_long}, so that none is left; {remedy}")
    rank_zero_warn(f"{are_too_long} and are left out; {remedy}", category=LeftOutRecordsWarning)
    return encoded.select([place for place, long in enumerate(is_long) if not long])


def report_format(form: Format, columns: Iterable[str], source: str) -> None:
    """Says in one line what data was taken for, and which columns are not read."""
    read = [name for name in columns if name in form.columns]
    others = [name for name in columns if name not in form.columns]
    rest = f"; it does not read {_listed(others)}" if others else ""
    rank_zero_info(f"The data {source!r} is read as {form.name}, from {_listed(read)}{rest}.")


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _encode(
    record: Any, index: int, *, encoder: RecordEncoder, features: dict[str, Any], numbers: Any, **options: Any
) -> dict[str, Any]:
    own = {name: without_filling(record[name], feature) for name, feature in features.items()}
    return encoder(own, index if numbers is None else int(numbers[index]), **options)
