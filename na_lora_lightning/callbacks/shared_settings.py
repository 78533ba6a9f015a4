"""Settings that the two callbacks of a trainer have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from na_lora_lightning.errors import ConfigurationError

_SHARED = ("observer", "allow_unmasked_gates", "example_inputs")


def require_same_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Checks that two callbacks that share a controller were given the same for it.

    Args:
        first: Attributes of one callback.
        second: Attributes of the other.

    Raises:
        ConfigurationError: They were not.
    """
    for name in _SHARED:
        if not are_same(first[f"_{name}"], second[f"_{name}"]):
            raise ConfigurationError(
                "the two NA-LoRA callbacks find and observe gates together and were given different values of "
                f"{name}; give both the same."
            )


def are_same(first: Any, second: Any) -> bool:
    """Equality of settings, tensors among them."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return isinstance(first, Tensor) and isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(are_same(value, second[name]) for name, value in first.items())
    return bool(first == second)
