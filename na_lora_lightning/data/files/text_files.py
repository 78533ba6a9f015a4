"""Text files in the encodings that everyday programs write, and one sentence about the others."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from na_lora_lightning.errors import DataError

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
    """Opens a text file in UTF-8, or in the encoding that its byte order mark tells.

    Args:
        path: The file.
        newline: As for the built-in ``open``.

    Raises:
        DataError: The file turns out to be in another encoding.
    """
    encoding = _encoding_of(path)
    try:
        with path.open(encoding=encoding, newline=newline) as file:
            yield file
    except UnicodeError as error:
        if isinstance(error, UnicodeEncodeError):
            raise
        raise _undecodable(path, encoding) from error


def _encoding_of(path: Path) -> str:
    with path.open("rb") as file:
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
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                position = f"byte 0x{line[error.start]:02x} at position {error.start + 1} of line {number}"
                return DataError(f"{where} is not in UTF-8 ({position}); {remedy}.")
    return DataError(f"{where} is not in UTF-8; {remedy}.")
