"""A hash of the code that reads and encodes data, under which results are cached."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path


@cache
def code_revision() -> str:
    """A hash of the source of this package of data modules; results of other code must not be reused."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
