"""A column of arbitrary values, which keeps each as it was written."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa
from datasets.features.features import register_feature


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
