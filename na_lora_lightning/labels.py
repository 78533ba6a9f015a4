"""The label that marks positions without a target."""

from __future__ import annotations

IGNORED_LABEL = -100
