"""The masked and scaled update, applied after the optimizer has computed its own::

    B_i  ←  B_i_before + m_i · η · (B_i_after − B_i_before)

It acts on the update and not on the gradient, because Adam-like optimizers cancel any constant rescaling of
gradients, keep moving zero-gradient rows through momentum, and decay weights whatever the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from na_lora_lightning.core.channels import as_slice
from na_lora_lightning.core.layout import Layout
from na_lora_lightning.core.lora_layers import LoRARows
from na_lora_lightning.core.sharding import is_sharded, local_part, local_rows
from na_lora_lightning.core.sites import GateSite
from na_lora_lightning.core.stepping.optimizers import weights_in_state


def blend_rows(before: Tensor, after: Tensor, weight: Tensor) -> Tensor:
    """Moves each row the fraction ``weight`` of its way from ``before`` to ``after``.

    Args:
        before: Rows before the optimizer's step, ``[rows, ...]``.
        after: Rows after it, the same shape and dtype.
        weight: ``[rows]``, or ``[rows, 1, experts]`` for rows of stacked experts; float32, non-negative; may exceed 1.

    Returns:
        The blended rows in their dtype; bitwise ``before`` where the weight is 0 and ``after`` where it is 1, also
        for values that are not finite.
    """
    weight = weight.reshape(*weight.shape, *(1,) * (before.ndim - weight.ndim))
    if before.dtype in (torch.float32, torch.float64):
        moved = torch.lerp(before, after, weight.to(before.dtype))
    else:
        moved = torch.lerp(before.float(), after.float(), weight).to(before.dtype)
    return torch.where(weight == 1.0, after, torch.where(weight == 0.0, before, moved))


def by_network(parameter: Tensor, networks: int) -> Tensor:
    """A view of LoRA rows with the experts apart: ``[out, r·E]`` to ``[out, r, E]``; unchanged for one network."""
    return parameter if networks == 1 else parameter.unflatten(1, (parameter.shape[1] // networks, networks))


@dataclass(frozen=True)
class _GateRows:
    """The rows of one parameter that make channels of one site, as far as this process holds them.

    Attributes:
        parameter: ``[rows, ...]``.
        index: Where the rows are in :func:`local_part` of it.
        before: A copy of them, ``[own channels, ...]``.
        columns: The site's channels among all of them.
        own: Which of a network's channels they make.
        networks: Number of networks of the site.
    """

    parameter: Tensor
    index: slice | Tensor
    before: Tensor
    columns: slice
    own: slice | Tensor
    networks: int

    def rows(self) -> Tensor:
        """The part of the parameter that this process holds, with the experts apart; a view."""
        return self.rows_of(self.parameter)

    def rows_of(self, like: Tensor) -> Tensor:
        """The same of a tensor that is laid out like the parameter, such as one of the optimizer's state."""
        return by_network(local_part(like), self.networks)

    def weight_of_rows(self, weights: Tensor) -> Tensor:
        """m·η of each own row, ``[own channels]`` or ``[own channels, 1, experts]``, from that of all channels."""
        weight = weights[self.columns].to(self.before.device)
        if self.networks > 1:
            weight = weight.view(self.networks, -1).T[:, None]
        return weight[self.own]


def _gate_rows(entry: LoRARows, site: GateSite, columns: slice) -> _GateRows | None:
    """The rows of a site in a parameter; None where this process holds none of them."""
    held = local_rows(entry.parameter, entry.name)
    own: slice | Tensor = slice(None)
    numbers, device = site.rows, entry.parameter.device
    if is_sharded(entry.parameter):
        own = ((numbers >= held.start) & (numbers < held.stop)).nonzero()[:, 0]
        if not own.numel():
            return None
        numbers = numbers[own] - held.start
    evenly = as_slice(numbers)
    index = evenly if evenly is not None else numbers.to(device)
    before = torch.empty_like(by_network(local_part(entry.parameter), site.networks)[index])
    own = own if isinstance(own, slice) else own.to(device)
    return _GateRows(entry.parameter, index, before, columns, own, site.networks)


def _in_state(optimizer: Optimizer, target: _GateRows, name: str) -> Tensor | None:
    kept: Tensor | None = optimizer.state.get(target.parameter, {}).get(name)
    return kept


def _whole_matrix(entry: LoRARows) -> _GateRows | None:
    """All rows of a matrix, which share one weight; None where this process holds none of them."""
    before = torch.empty_like(local_part(entry.parameter))
    if not before.numel():
        return None
    shared = torch.zeros(len(before), dtype=torch.long, device=before.device)
    return _GateRows(entry.parameter, slice(None), before, slice(0, 1), shared, 1)


class RowUpdate:
    """Remembers rows before an optimizer's step and corrects them after it.

    Each process works on the rows that it holds.

    Args:
        targets: The rows; None stands for those that this process does not hold.
    """

    def __init__(self, targets: Iterable[_GateRows | None]) -> None:
        self._targets = [rows for rows in targets if rows is not None]
        self._state_before: list[list[Tensor]] = []

    @classmethod
    def of_channels(cls, sites: Sequence[GateSite], layout: Layout) -> RowUpdate:
        """Of the rows that make gate channels, with a weight for each channel.

        Args:
            sites: Gate sites whose LoRA rows are trained.
            layout: Flat layout of their channels.
        """
        return cls(
            _gate_rows(entry, site, columns)
            for site, columns in zip(sites, layout.site_slices, strict=True)
            for entry in site.parameters()
        )

    @classmethod
    def of_matrices(cls, entries: Iterable[LoRARows]) -> RowUpdate:
        """Of whole matrices, with one weight for all of them."""
        return cls(_whole_matrix(entry) for entry in entries)

    @torch.no_grad()
    def remember(self, optimizer: Optimizer) -> None:
        """Copies the rows, and those of weights that the optimizer keeps; called before its step."""
        for target in self._targets:
            target.before.copy_(target.rows()[target.index])
        self._state_before = [
            [self._weights_before(target, _in_state(optimizer, target, name)) for target in self._targets]
            for name in weights_in_state(optimizer)
        ]

    @staticmethod
    def _weights_before(target: _GateRows, weights: Tensor | None) -> Tensor:
        # In its first step the optimizer copies them from the parameter.
        return target.before if weights is None else target.rows_of(weights)[target.index].clone()

    @torch.no_grad()
    def correct(self, weights: Tensor, optimizer: Optimizer) -> None:
        """Blends the rows.

        Args:
            weights: m·η per channel of all sites, ``[channels]`` float32; ``[1]`` for whole matrices.
            optimizer: The one that stepped.
        """
        for target in self._targets:
            self._blend(target, target.parameter, target.before, weights)
        for name, before in zip(weights_in_state(optimizer), self._state_before, strict=True):
            for target, rows_before in zip(self._targets, before, strict=True):
                kept = _in_state(optimizer, target, name)
                if kept is not None:
                    self._blend(target, kept, rows_before, weights)

    @staticmethod
    def _blend(target: _GateRows, moved: Tensor, before: Tensor, weights: Tensor) -> None:
        rows = target.rows_of(moved)
        rows[target.index] = blend_rows(before, rows[target.index], target.weight_of_rows(weights))
