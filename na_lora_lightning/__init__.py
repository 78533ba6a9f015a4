"""Nonlinearity-aware LoRA for PyTorch Lightning.

The public names are those of ``__init__.pyi``. They are imported on first use, so that ``import na_lora_lightning``
stays cheap.
"""

from __future__ import annotations

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOMES = {each.name: str(node.module) for node in _STUB.body if isinstance(node, ast.ImportFrom) for each in node.names}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
