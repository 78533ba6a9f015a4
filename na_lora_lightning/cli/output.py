"""Output into a pipe whose reader has gone, as in ``na-lora inspect --json | head``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Stream:
    """A stream whose text goes nowhere once nobody reads it, so that the work goes on."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except BrokenPipeError:
            self._leave()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._leave()

    def _leave(self) -> None:
        # For whoever else writes there, and for what waits in buffers until the interpreter ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unread_output_is_dropped() -> Iterator[None]:
    """Lets a command go on to its end when the reader of its output stops, as ``head`` does."""
    streams = sys.stdout, sys.stderr
    output, errors = (stream and _Stream(stream) for stream in streams)
    sys.stdout, sys.stderr = output, errors
    try:
        yield
    finally:
        for stream in (output, errors):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = streams
