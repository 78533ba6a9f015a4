"""Options beside a saved state: which of them differ from those that it is loaded with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from na_lora_lightning.errors import ConfigurationError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Changes = dict[str, tuple[Any, Any]]
"""Values by option, as they were and as they are."""


def saved_options(state: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The options of a saved state; a state of an earlier version has those of ``names`` alone, or none."""
    return dict(state.get("options") or {name: state[name] for name in names if name in state})


def changed_options(saved: Mapping[str, Any], options: DataclassInstance) -> Changes:
    """Which of the saved options have another value now; those that were not saved are not compared."""
    now = asdict(options)
    return {name: (saved[name], now[name]) for name in saved if name in now and saved[name] != now[name]}


def require_same_average(mechanism: str, changes: Changes, *names: str) -> None:
    """Refuses options without which a saved average means something else.

    Raises:
        ConfigurationError: One of ``names`` has changed.
    """
    for name in names:
        if name in changes:
            then, now = changes[name]
            raise ConfigurationError(
                f"the checkpoint's {mechanism} was averaged with {name}={then!r} and this run has {now!r}, which "
                f"cannot be continued; set {name} as it was, or start a new run."
            )


def in_words(changes: Changes) -> str:
    """One clause, such as ``"beta 0.9 → 0.5, scope site → global"``."""
    return ", ".join(f"{name} {then} → {now}" for name, (then, now) in changes.items())
