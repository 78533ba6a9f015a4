"""What a mechanism is: it sees the statistics of each step and says how much of its update each gate row takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from na_lora_lightning.core.channels import Layout
from na_lora_lightning.core.mechanisms.saved_options import Changes, changed_options, saved_options
from na_lora_lightning.core.observation.observer import Collector, StepStatistics
from na_lora_lightning.core.sites import GateSite


class Mechanism(ABC):
    """One way of correcting the updates of gate rows.

    Args:
        options: Its options.
        sites: Gate sites.
        layout: Layout of its collector's columns.

    Attributes:
        name: Of its statistics and of its state.
        title: What messages call it.
        steps: Optimizer steps seen.
        factor_of_a: Factor on the step of ``lora_A`` of the gate layers.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    # Tensors that a checkpoint holds.
    _STATE: ClassVar[tuple[str, ...]]

    options: Any
    layout: Layout
    steps: int
    factor_of_a: float = 1.0

    def __init__(self, *, options: Any, sites: Sequence[GateSite], layout: Layout) -> None:
        raise NotImplementedError

    @classmethod
    @abstractmethod
    def collector(cls, options: Any) -> Collector:
        """What is summed over tokens for it."""

    @property
    @abstractmethod
    def is_active(self) -> bool:
        """Whether an update must be changed by now."""

    @property
    @abstractmethod
    def has_acted(self) -> bool:
        """Whether it has changed an update; may synchronise with the device."""

    @property
    @abstractmethod
    def seen(self) -> Tensor:
        """Which networks it has statistics of, ``[networks]``, boolean."""

    @abstractmethod
    def row_weights(self, channels: Layout) -> Tensor:
        """The part of its update that the rows of each channel take, ``[channels of all sites]``, float32."""

    @abstractmethod
    def update(self, statistics: StepStatistics) -> None:
        """Takes in one optimizer step."""

    @abstractmethod
    def metrics(self) -> dict[str, Tensor]:
        """Curves by group, each ``[sites]``."""

    def attach(self) -> None:  # noqa: B027 - most have no hooks of their own
        """Puts hooks of its own on the model, where it has any."""

    def detach(self) -> None:  # noqa: B027
        """Takes them off."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that restore this object exactly."""
        return {
            "steps": self.steps,
            "options": asdict(self.options),
            **{name.lstrip("_"): getattr(self, name).clone() for name in self._STATE},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> Changes:
        """Restores what :meth:`state_dict` returned; the options are those of this object, from the next step on.

        Returns:
            Options that differ from those of the state.

        Raises:
            ConfigurationError: The state belongs to a model with other gates, or is an average of something else.
        """
        changes = changed_options(saved_options(state, *self._SAVED_ALONE), self.options)
        self._require_fitting(state, changes)
        self.steps = int(state["steps"])
        for name in self._STATE:
            setattr(self, name, state[name.lstrip("_")].to(getattr(self, name)))
        self._adopt(changes)
        return changes

    # Options that states of earlier versions hold, which have no others.
    _SAVED_ALONE: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def _require_fitting(self, state: Mapping[str, Any], changes: Changes) -> None:
        """Refuses a state that cannot be continued."""

    @abstractmethod
    def _adopt(self, changes: Changes) -> None:
        """Brings what is in force in line with options that have changed."""


def moving_average(average: Tensor, value: Tensor, valid: Tensor | None, beta: float) -> Tensor:
    """β·average + (1−β)·value where ``valid`` (None for everywhere), and ``average`` elsewhere.

    All are of one shape, or ``value`` is one for all.

    The average starts at zero. Averaging ones in the same way gives its total weight, 1 − β^t after t valid steps,
    and the quotient is the bias-corrected average.
    """
    moved = torch.lerp(value, average, beta)
    return moved if valid is None else torch.where(valid, moved, average)


def mean_per_site(values: Tensor, layout: Layout) -> Tensor:
    """Means over each site's columns, ``[columns]`` to ``[sites]``."""
    return layout.over_sites(values, lambda columns: columns.mean(dim=-1))
