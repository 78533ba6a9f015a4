"""What the prepared records of a split ask of a model: token ids that it has, and positions for each record."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from na_lora_lightning.errors import ConfigurationError, DataError

_ROWS_AT_ONCE = 4096
_IDS = ("input_ids", "text_ids", "prompt_input_ids")


class Limits(Protocol):
    """What a model takes; :class:`~na_lora_lightning.models.limits.ModelLimits` reads it off one.

    Attributes:
        rows: Number of rows of the input embedding: token ids are below it.
        placeholders: Ids above that which stand for images and the like.
        positions: The number of positions that the configuration names, and its name there; None where it names none.
    """

    rows: int
    placeholders: frozenset[int]
    positions: tuple[int, str] | None

    def usable_length(self, length: int) -> int:
        """The most tokens up to ``length`` that the model can take at once."""

    def describe_positions(self) -> str:
        """How messages call the number of positions."""


class LongRecordsWarning(UserWarning):
    """Records have more tokens than the model was made for."""


def require_ids(encoded: Dataset, source: str, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> None:
    """Checks that a model has an embedding for each token of a split.

    Args:
        encoded: The split as it was prepared.
        source: The name of the data, for messages.
        tokenizer: Of the data.
        limits: Of the model.

    Raises:
        ConfigurationError: It lacks the token that batches are padded with.
        DataError: It lacks a token of a record; names the first.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    beyond = f"the model has embeddings for the ids 0 to {limits.rows - 1}"
    if pad is not None and pad >= limits.rows:
        raise ConfigurationError(
            f"batches are padded with {tokenizer.convert_ids_to_tokens(pad)!r} (id {pad}), and {beyond}; set the "
            "tokenizer's pad_token to one of those, or resize the model's embedding and save it first."
        )
    for column in _IDS:
        if column in encoded.column_names:
            found = _first_id_beyond(encoded, column, limits)
            if found is not None:
                record, token = found
                require_token(token, record, source, tokenizer, limits)


def require_token(token: int, record: int, source: str, tokenizer: PreTrainedTokenizerBase, limits: Limits) -> None:
    """Checks that a model has an embedding for a token of a record.

    Raises:
        DataError: It has none.
    """
    if token >= limits.rows and token not in limits.placeholders:
        raise DataError(
            f"record {record + 1} of {source!r} has the token {tokenizer.convert_ids_to_tokens(token)!r} (id {token}), "
            f"and the model has embeddings for the ids 0 to {limits.rows - 1}; resize its embedding and save it first, "
            "or use the model's own tokenizer."
        )


def require_positions(
    encoded: Dataset, source: str, limits: Limits, *, pad_to_multiple_of: int, max_new_tokens: int
) -> None:
    """Checks that a model has a position for each token of a split's records, and of what is generated after prompts.

    Args:
        encoded: The split as it was prepared.
        source: The name of the data, for messages.
        limits: Of the model.
        pad_to_multiple_of: What the length of a batch is rounded up to a multiple of.
        max_new_tokens: Number of tokens that are generated after prompts; 0 if none are.

    Raises:
        DataError: A record is too long; names the longest.
    """
    record, length = _longest(encoded, "input_ids")
    padded = -(-length // pad_to_multiple_of) * pad_to_multiple_of
    usable = limits.usable_length(padded)
    if usable < padded:
        rounded = f" ({padded} when padded)" if padded > length else ""
        fitting = usable // pad_to_multiple_of * pad_to_multiple_of
        raise DataError(
            f"record {record + 1} of {source!r} has {length} tokens{rounded}, and {limits.describe_positions()}; set "
            f"data.max_length to {fitting} or less, or shorten it."
        )
    if limits.positions is not None and length > limits.positions[0]:
        rank_zero_warn(
            f"record {record + 1} of {source!r} has {length} tokens, and the model was made for {limits.positions[0]} "
            f"({limits.positions[1]}); lower data.max_length if long texts do badly.",
            category=LongRecordsWarning,
        )
    if max_new_tokens and "prompt_input_ids" in encoded.column_names:
        record, length = _longest(encoded, "prompt_input_ids")
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
        # The last token that is generated is not read any more.
        usable = limits.usable_length(length + max_new_tokens - 1)
        if usable < length + max_new_tokens - 1:
            room = usable - length + 1
            lower = f"set evaluation.max_new_tokens to {room} or less, or " if room > 0 else ""
            raise DataError(
                f"record {record + 1} of {source!r} has a prompt of {length} tokens, which with "
                f"evaluation.max_new_tokens={max_new_tokens} is more than {usable}, and {limits.describe_positions()}; "
                f"{lower}shorten prompts."
            )


def require_bound(max_length: int, limits: Limits) -> None:
    """Checks that a model has positions for as many tokens as a record of images and text may have.

    Raises:
        ConfigurationError: It has fewer.
    """
    usable = limits.usable_length(max_length)
    if usable < max_length:
        raise ConfigurationError(
            f"data.max_length={max_length} allows records that are too long, as {limits.describe_positions()}; set it "
            f"to {usable} or less."
        )


def _first_id_beyond(encoded: Dataset, column: str, limits: Limits) -> tuple[int, int] | None:
    """The record, by its number in the data, and the id."""
    for start, table in _tables(encoded, [column]):
        ids = table.column(column).combine_chunks()
        values = pc.list_flatten(ids).to_numpy(zero_copy_only=False)
        wrong = values >= limits.rows
        if wrong.any():
            wrong &= ~np.isin(values, list(limits.placeholders))
        if wrong.any():
            place = int(wrong.argmax())
            row = int(pc.list_parent_indices(ids)[place].as_py())
            return _number(encoded, start + row), int(values[place])
    return None


def _longest(encoded: Dataset, column: str) -> tuple[int, int]:
    record = length = 0
    for start, table in _tables(encoded, [column]):
        lengths = pc.list_value_length(table.column(column).combine_chunks()).to_numpy(zero_copy_only=False)
        if len(lengths) and lengths.max() > length:
            record, length = start + int(lengths.argmax()), int(lengths.max())
    return _number(encoded, record), length


def _tables(encoded: Dataset, columns: list[str]) -> Any:
    arrow = encoded.select_columns(columns).with_format("arrow")
    for start in range(0, len(arrow), _ROWS_AT_ONCE):
        yield start, arrow[start : start + _ROWS_AT_ONCE]


def _number(encoded: Dataset, row: int) -> int:
    return int(encoded[row]["index"]) if "index" in encoded.column_names else row
