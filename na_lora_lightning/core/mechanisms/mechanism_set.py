"""The mechanisms of one model together: what they weigh, what they show, what they save."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor

from na_lora_lightning.core.channels import Layout
from na_lora_lightning.core.mechanisms.importance import TemporalImportance
from na_lora_lightning.core.mechanisms.mechanism import Mechanism
from na_lora_lightning.core.mechanisms.saved_options import Changes, changed_options, saved_options
from na_lora_lightning.core.mechanisms.step_scale import StepScale
from na_lora_lightning.core.mechanisms.watching import Watching
from na_lora_lightning.core.observation.observer import GateObserver, StepStatistics
from na_lora_lightning.core.sites import GateMap
from na_lora_lightning.errors import ConfigurationError

_M = TypeVar("_M", bound=Mechanism)
_KINDS: tuple[type[Mechanism], ...] = (TemporalImportance, StepScale)


class MechanismSet:
    """The mechanisms that are on, in the order in which they were turned on.

    Args:
        gates: The gates of the model.
        observer: Looks at them.
        layout: Layout of their channels.
    """

    def __init__(self, gates: GateMap, observer: GateObserver, layout: Layout) -> None:
        self._gates = gates
        self._observer = observer
        self._layout = layout
        self._by_name: dict[str, Mechanism] = {}
        self._watching: Watching | None = None
        self._is_attached = False

    def __iter__(self) -> Iterator[Mechanism]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def turn_on(self, kind: type[_M], options: Any) -> _M:
        """Adds a mechanism.

        Raises:
            ConfigurationError: It is on already, its options do not work for a site, or training began.
        """
        if self._is_attached:
            raise ConfigurationError(f"the {kind.title} is set after training began; set it before attach().")
        if kind.name in self._by_name:
            raise ConfigurationError(f"the {kind.title} is set twice for one model; keep one of the two callbacks.")
        options.check(self._gates.sites)
        layout = self._observer.add(kind.name, kind.collector(options))
        mechanism = kind(options=options, sites=self._gates.sites, layout=layout)
        self._by_name[kind.name] = mechanism
        return mechanism

    @property
    def importance(self) -> TemporalImportance | None:
        """Mechanism one, where it is on."""
        found = self._by_name.get(TemporalImportance.name)
        return found if isinstance(found, TemporalImportance) else None

    @property
    def step_scale(self) -> StepScale | None:
        """Mechanism two, where it is on."""
        found = self._by_name.get(StepScale.name)
        return found if isinstance(found, StepScale) else None

    @property
    def watched_scale(self) -> StepScale | None:
        """What the step scale would be by the last measured step alone, where rows are only watched."""
        return None if self._watching is None else self._watching.scale

    @property
    def are_neutral(self) -> bool:
        """Whether every row keeps its update by what is asked for."""
        return all(mechanism.options.is_neutral for mechanism in self)

    @property
    def are_active(self) -> bool:
        """Whether updates are corrected by now."""
        return any(mechanism.is_active for mechanism in self)

    @property
    def row_weights(self) -> Tensor:
        """The part of its update that the rows of each channel take, ``[channels of all sites]``, float32."""
        active = [mechanism.row_weights(self._layout) for mechanism in self if mechanism.is_active]
        return reduce(torch.mul, active) if active else torch.ones(self._layout.total, device=self._observer.device)

    @property
    def factor_of_a(self) -> float:
        """The part of its update that ``lora_A`` of the gate layers takes."""
        return math.prod(mechanism.factor_of_a for mechanism in self)

    def attach(self, is_measured: Callable[[], bool]) -> None:
        """Puts the mechanisms' own hooks on; with a mask that holds nothing alone, the step scale is watched too.

        Args:
            is_measured: Whether the coming step is measured.
        """
        self._is_attached = True
        for mechanism in self:
            mechanism.attach()
        if self._watching is None and self.step_scale is None and self.are_neutral:
            self._watching = Watching(self._observer, self._gates.sites, self._layout, is_measured)

    def detach(self) -> None:
        """Takes the hooks off."""
        self._is_attached = False
        for mechanism in self:
            mechanism.detach()

    def update(self, statistics: Mapping[str, StepStatistics]) -> None:
        """Takes in one optimizer step."""
        for name, mechanism in self._by_name.items():
            mechanism.update(statistics[name])
        if self._watching is not None:
            self._watching.update(statistics)

    def metrics(self) -> dict[str, Tensor]:
        """Curves by group, each ``[sites]``."""
        groups: dict[str, Tensor] = {}
        for mechanism in self:
            groups |= mechanism.metrics()
        return groups if self.watched_scale is None else groups | self.watched_scale.metrics()

    def state_dict(self) -> dict[str, Any]:
        """The state of all, and of what the observer counts."""
        return self._state_of_observer() | {name: each.state_dict() for name, each in self._by_name.items()}

    def state_of(self, mechanism: Mechanism) -> dict[str, Any]:
        """The same for one that is saved by itself."""
        return {"mechanism": mechanism.state_dict()} | self._state_of_observer()

    def _state_of_observer(self) -> dict[str, Any]:
        return {"forward_passes": self._observer.forward_passes, "options": asdict(self._observer.options)}

    def load_state_dict(self, state: Mapping[str, Any]) -> Changes:
        """Restores what :meth:`state_dict` returned.

        Returns:
            Options that differ from those of the state.

        Raises:
            ConfigurationError: The state is of other mechanisms or gates, or of options that cannot be changed.
        """
        saved = sorted({kind.name for kind in _KINDS} & state.keys())
        if saved != sorted(self._by_name):
            raise ConfigurationError(
                f"the checkpoint holds the state of {' and '.join(saved) or 'no mechanism'} and this run has "
                f"{' and '.join(sorted(self._by_name)) or 'none'}; resume with the mechanisms of the checkpoint."
            )
        changes = self._load_observer(state)
        for name in saved:
            changed = self._by_name[name].load_state_dict(state[name])
            changes |= {f"{name}.{option}": values for option, values in changed.items()}
        return changes

    def load_state_of(self, mechanism: Mechanism, state: Mapping[str, Any]) -> Changes:
        """Restores what :meth:`state_of` returned, in the same way."""
        return self._load_observer(state) | mechanism.load_state_dict(state["mechanism"])

    def _load_observer(self, state: Mapping[str, Any]) -> Changes:
        self._observer.forward_passes = int(state["forward_passes"])
        return changed_options(saved_options(state), self._observer.options)
