"""The options that data modules share, as one object.

They have the names of the arguments of the data modules, which explain them and have their defaults.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from typing_extensions import Self

from na_lora_lightning.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The options of all data modules.

    Raises:
        ConfigurationError: An option has a value that cannot work.
    """

    # Names, or for texts lists of sources.
    train: Any
    validation: Any
    test: Any
    predict: Any
    dataset_config: str | None
    columns: dict[str, str] | None
    batch_size: int
    validation_batch_size: int | None
    shuffle: bool
    num_workers: int
    seed: int

    def __post_init__(self) -> None:
        require_at_least(1, batch_size=self.batch_size, validation_batch_size=self.validation_batch_size)
        require_at_least(0, num_workers=self.num_workers, seed=self.seed)

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> Self:
        """Returns the options that are among the arguments of a data module's constructor."""
        return cls(**{option.name: arguments[option.name] for option in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class TextOptions(DataOptions):
    """The options of data modules for texts.

    Raises:
        ConfigurationError: An option has a value that cannot work, or two contradict each other.
    """

    format: str | None
    max_length: int
    chat_template: str | None
    use_chat_template: bool | None
    system_prompt: str | None
    group_by_length: bool
    pad_to_multiple_of: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, pad_to_multiple_of=self.pad_to_multiple_of)
        require_at_least(2, max_length=self.max_length)
        if self.group_by_length and not self.shuffle:
            raise ConfigurationError(
                "shuffle=False keeps the order of the records, which group_by_length=True changes; set "
                "group_by_length=False too."
            )
        for name in ("system_prompt", "chat_template"):
            if getattr(self, name) is not None and self.use_chat_template is False:
                raise ConfigurationError(
                    f"{name} needs a chat template, which use_chat_template=False turns off; leave one out."
                )


def require_at_least(minimum: int, **options: int | None) -> None:
    """Refuses options that are smaller than a minimum; None is none.

    Raises:
        ConfigurationError: One is.
    """
    for name, value in options.items():
        if value is not None and value < minimum:
            raise ConfigurationError(f"{name}={value} is too small; set it to {minimum} or more.")


def require_known_columns(columns: Mapping[str, str] | None, known: Sequence[str]) -> None:
    """Refuses names for columns that a data module does not read.

    Raises:
        ConfigurationError: There is one.
    """
    unknown = sorted(set(columns or {}) - set(known))
    if unknown:
        *first, last = (repr(name) for name in known)
        raise ConfigurationError(f"columns has the unknown key {unknown[0]!r}; use {', '.join(first)} and {last}.")
