"""JSON and JSON Lines, read to the letter: no types are guessed, and what a record lacks is not filled in."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TextIO

import pyarrow as pa
from datasets import Features, Value
from datasets.features.features import register_feature

from na_lora_lightning.data.files.record_tables import Rows, Table, batches_of, open_text
from na_lora_lightning.errors import DataError

_TEXT, _ANYTHING = "string", "json"
_CHUNK = 1 << 20
# Where a text is cut off, the decoder complains so many characters before its end at most.
_LONGEST_TOKEN = 16
_SPACE = re.compile(r"[ \t\r\n]*")


def read_json(paths: list[Path], names: frozenset[str]) -> Table:
    """Reads files that have one object for each record, in lines, in a row, or in one array.

    Args:
        paths: The files.
        names: The columns that matter, which make no difference here.

    Returns:
        The columns, which hold JSON unless all of their values are text, integers, or booleans; and the rows.

    Raises:
        DataError: A file is malformed; the message names the line.
    """
    kinds: dict[str, str | None] = {}
    for record in _records(paths):
        for key, value in record.items():
            if value is not None:
                kind = _kind_of(value)
                kinds[key] = kind if kinds.get(key) in (None, kind) else _ANYTHING
            else:
                kinds.setdefault(key, None)
    features = {
        key: JsonText() if kind == _ANYTHING else Value(kind or _TEXT)
        for key, kind in kinds.items()
        # Half a character cannot be part of the name of a column.
        if _kind_of(key) == _TEXT
    }

    def rows() -> Rows:
        for record in _records(paths):
            yield {
                key: value if value is None or kinds[key] != _ANYTHING else json.dumps(value)
                for key, value in record.items()
                if key in features
            }

    return batches_of(rows(), Features(features))


def json_records(paths: list[Path], names: frozenset[str]) -> Iterator[dict[str, Any]]:
    """Reads the same files one record after another, as they are."""
    return _records(paths)


def _kind_of(value: Any) -> str:
    if isinstance(value, str):
        is_text = value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)
        return _TEXT if is_text else _ANYTHING
    if isinstance(value, bool):
        return "bool"
    return "int64" if isinstance(value, int) and -(2**63) <= value < 2**63 else _ANYTHING


def _records(paths: list[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        with open_text(path) as file:
            yield from _Scanner(file, path).records()


class _Scanner:
    """Reads one value after the other, and no more of the file than that takes."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self.file = file
        self.path = path
        self.buffer = ""
        self.position = 0
        self.line = 1
        self.ended = False

    def records(self) -> Iterator[dict[str, Any]]:
        if self.next_character() != "[":
            while self.next_character():
                yield self.read_object()
            return
        self.position += 1
        separator = "," if self.next_character() != "]" else "]"
        self.position += separator == "]"
        while separator == ",":
            yield self.read_object()
            separator = self.next_character()
            if separator not in (",", "]"):
                self.refuse("its array has no comma or end here" if separator else "its array has no end")
            self.position += 1
        if self.next_character():
            self.refuse("there is something after the end of its array")

    def next_character(self) -> str:
        """Goes to the next character that is not white space; the empty string stands for the end."""
        while True:
            end = self._end_of_space()
            self.line += self.buffer.count("\n", self.position, end)
            self.position = end
            if end < len(self.buffer):
                return self.buffer[end]
            if not self.read_more():
                return ""

    def read_object(self) -> dict[str, Any]:
        if self.next_character() != "{":
            self.refuse("it is not a JSON object")
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.position)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self.buffer) - _LONGEST_TOKEN
                if is_cut and self.read_more():
                    continue
                self.refuse_at(error.pos, error.msg)
            except RecursionError:
                self.refuse("it is nested too deeply")
            except ValueError as error:
                self.refuse(str(error).partition(";")[0])
            else:
                self.line += self.buffer.count("\n", self.position, end)
                self.position = end
                return value

    def read_more(self) -> bool:
        rest = self.buffer[self.position :]
        chunk = "" if self.ended else self.file.read(max(_CHUNK, len(rest)))
        self.ended = not chunk
        self.buffer, self.position = rest + chunk, 0
        return not self.ended

    def refuse_at(self, position: int, reason: str) -> NoReturn:
        # What is missing is missing where the text before it ends, and not at the beginning of the next line.
        before = self.buffer[:position].rstrip()
        if "\n" in self.buffer[len(before) : position]:
            position = len(before)
        self.line += self.buffer.count("\n", self.position, position)
        column = position - self.buffer.rfind("\n", 0, position)
        self.refuse(f"{reason.rstrip(': ').removesuffix(' at')} at column {column}")

    def refuse(self, reason: str) -> NoReturn:
        raise DataError(f"line {self.line} of {str(self.path)!r} is malformed ({reason}); correct or remove it.")

    def _end_of_space(self) -> int:
        match = _SPACE.match(self.buffer, self.position)
        return match.end() if match else self.position


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the key {next(name for name in names if names.count(name) > 1)!r} twice")
    return value


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"it has the number {text[:20]}, which is too large")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_number)


@dataclass
class JsonText:
    """A feature of ``datasets`` for values that have no common type, stored as JSON text.

    A struct of Arrow has the same fields in all rows, so that a key of one row would be null in all others.
    """

    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "json"
    pa_type: ClassVar[Any] = pa.string()
    _type: str = field(default="NaLoraJsonText", init=False, repr=False)

    def __call__(self) -> Any:
        """The type that it is stored as."""
        return self.pa_type

    def encode_example(self, value: Any) -> str | None:
        """The text of a value."""
        return None if value is None else json.dumps(value)

    def decode_example(self, value: str | None, token_per_repo_id: Any = None) -> Any:
        """The value of a text."""
        return None if value is None else json.loads(value)


with warnings.catch_warnings():
    # It calls itself experimental.
    warnings.simplefilter("ignore")
    register_feature(JsonText, "NaLoraJsonText")
