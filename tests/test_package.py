"""The public names, and that importing them is cheap."""

from __future__ import annotations

import subprocess
import sys

import pytest

import na_lora_lightning


def test_every_public_name_is_there() -> None:
    for name in na_lora_lightning.__all__:
        assert getattr(na_lora_lightning, name) is not None
    assert set(na_lora_lightning.__all__) <= set(dir(na_lora_lightning))
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        na_lora_lightning.Nonsense  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, na_lora_lightning, na_lora_lightning.cli.main; print([m for m in sys.modules if '.' not in m])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "transformers", "lightning", "peft"):
        assert f"'{heavy}'" not in loaded


def test_the_core_does_not_import_lightning_or_peft() -> None:
    code = "import sys, na_lora_lightning.core.controller; print([m for m in sys.modules if '.' not in m])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for foreign in ("lightning", "pytorch_lightning", "peft", "transformers"):
        assert f"'{foreign}'" not in loaded
