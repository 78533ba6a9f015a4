"""Which versions of the packages around it a way in needs, where it needs more than the callbacks do."""

from __future__ import annotations

import re
from importlib.metadata import version

from na_lora_lightning.errors import ConfigurationError

_TRANSFORMERS = 5


def require_new_transformers() -> None:
    """Checks that transformers is new enough for the command line and its modules.

    Raises:
        ConfigurationError: It is too old.
    """
    installed = version("transformers")
    major = re.match(r"\d+", installed)
    if major and int(major[0]) < _TRANSFORMERS:
        raise ConfigurationError(
            f"transformers {installed} is installed, and the command line and its modules need {_TRANSFORMERS}.0 or "
            "newer; upgrade it, or use the callbacks in a project of your own, which work from 4.57."
        )
