"""The masked and scaled update, applied after the optimizer has computed its own::

    B_i  ←  B_i_before + m_i · η · (B_i_after − B_i_before)

It acts on the update and not on the gradient, because Adam-like optimizers cancel any constant rescaling of
gradients, keep moving zero-gradient rows through momentum, and decay weights whatever the gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from na_lora_lightning.core.channels import Layout, as_slice
from na_lora_lightning.core.lora_layers import LoRARows
from na_lora_lightning.core.sharding import is_sharded, local_part, local_rows
from na_lora_lightning.core.sites import GateSite
from na_lora_lightning.core.stepping.optimizers import weights_in_state
from na_lora_lightning.errors import UpdateError

_PARAMETER = ""
# Of rows that are copied at once.
_MOST_ELEMENTS = 1 << 22


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
class _Rows:
    """The corrected rows of one parameter, as far as this process holds them.

    Attributes:
        parameter: ``[rows, ...]``.
        index: Where the rows are in :func:`local_part` of it.
        weight: Which of all weights each of them takes, ``[own rows]`` or ``[own rows, 1, experts]``, int64.
        networks: Number of networks of the site.
    """

    parameter: Tensor
    index: slice | Tensor
    weight: Tensor
    networks: int = 1

    def whole(self, like: Tensor) -> Tensor:
        """What this process holds of a tensor that is laid out like the parameter, with the experts apart; a view."""
        return by_network(local_part(like), self.networks)


def _rows_of_channels(entry: LoRARows, site: GateSite, columns: slice) -> _Rows:
    """The rows of a site in a parameter."""
    held = local_rows(entry.parameter, entry.name)
    numbers = site.rows
    weight = torch.arange(columns.start, columns.stop)
    if site.networks > 1:
        weight = weight.view(site.networks, -1).T[:, None]
    if is_sharded(entry.parameter):
        own = ((numbers >= held.start) & (numbers < held.stop)).nonzero()[:, 0]
        numbers, weight = numbers[own] - held.start, weight[own]
    evenly = as_slice(numbers) if numbers.numel() else None
    index = numbers.to(entry.parameter.device) if evenly is None else evenly
    return _Rows(entry.parameter, index, weight, site.networks)


def _whole_matrix(entry: LoRARows, weight: int) -> _Rows:
    """All rows of a matrix, which share one weight."""
    return _Rows(entry.parameter, slice(None), torch.full((len(local_part(entry.parameter)),), weight))


class _Group:
    """Rows of several parameters that are alike, so that they are copied and blended at once.

    Args:
        members: The rows of each.
        device: Where the weights are.
    """

    def __init__(self, members: Sequence[_Rows], device: torch.device) -> None:
        self._members = members
        self._are_views = isinstance(members[0].index, slice)
        weight = torch.cat([rows.weight for rows in members])
        evenly = as_slice(weight) if weight.ndim == 1 else None
        self._weight = weight.to(device) if evenly is None else evenly
        self._before: dict[str, Tensor] = {}

    def remember(self, optimizer: Optimizer) -> None:
        """Copies the rows, and those of weights that the optimizer keeps."""
        for name in (_PARAMETER, *weights_in_state(optimizer)):
            self._before[name] = torch.cat(self._rows(self._tensors(optimizer, name)), out=self._before.get(name))

    def correct(self, weights: Tensor, optimizer: Optimizer) -> None:
        """Blends the rows by those of all weights that are theirs."""
        for name, before in self._before.items():
            tensors = self._tensors(optimizer, name)
            after = self._rows(tensors)
            blended = blend_rows(before, torch.cat(after), weights[self._weight].to(before.device))
            parts = blended.split([len(rows.weight) for rows in self._members])
            if self._are_views and all(tensor is not None for tensor in tensors):
                # Undocumented, and what torch's own optimizers copy with: one launch for all.
                torch._foreach_copy_(after, parts)
                continue
            for rows, tensor, part in zip(self._members, tensors, parts, strict=True):
                if tensor is not None:
                    rows.whole(tensor)[rows.index] = part

    def _tensors(self, optimizer: Optimizer, name: str) -> list[Tensor | None]:
        """The parameters, or what the optimizer keeps beside each under a name."""
        if name == _PARAMETER:
            return [rows.parameter for rows in self._members]
        return [optimizer.state.get(rows.parameter, {}).get(name) for rows in self._members]

    def _rows(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        # In its first step the optimizer copies its own weights from the parameter.
        pairs = zip(self._members, tensors, strict=True)
        return [rows.whole(rows.parameter if tensor is None else tensor)[rows.index] for rows, tensor in pairs]


class RowUpdate:
    """Remembers rows before an optimizer's step and corrects them after it.

    Each process works on the rows that it holds.

    Args:
        sites: Gate sites whose LoRA rows are trained, with a weight for each channel.
        layout: Flat layout of their channels.
        matrices: Matrices that are corrected as a whole, with one weight for all of them.
    """

    def __init__(self, sites: Sequence[GateSite], layout: Layout, matrices: Iterable[LoRARows] = ()) -> None:
        pairs = zip(sites, layout.site_slices, strict=True)
        rows = [_rows_of_channels(entry, site, columns) for site, columns in pairs for entry in site.parameters()]
        whole = [_whole_matrix(entry, layout.total) for entry in matrices]
        self._adapters = [(site, site.adapters) for site in sites]
        self._groups = [_Group(members, layout.network_of_column.device) for members in _alike(rows + whole)]
        self._has_matrices = bool(whole)

    @torch.no_grad()
    def remember(self, optimizer: Optimizer) -> None:
        """Copies the rows; called before the step.

        Raises:
            UpdateError: Other adapters are active than those whose rows these are.
        """
        for site, adapters in self._adapters:
            if site.adapters != adapters:
                raise UpdateError(
                    f"the active adapters of {site.lora_layer_name!r} were {adapters} when training began and are "
                    f"{site.adapters} now, so other rows train than those that are masked; call set_adapter() before "
                    "training, and train one adapter after the other in a fit of its own."
                )
        for group in self._groups:
            group.remember(optimizer)

    @torch.no_grad()
    def correct(self, optimizer: Optimizer, weights: Tensor, of_matrices: float = 1.0) -> None:
        """Blends the rows.

        Args:
            optimizer: The one that stepped.
            weights: m·η per channel of all sites, ``[channels]`` float32.
            of_matrices: The weight of all rows of the matrices.
        """
        if self._has_matrices:
            weights = nn.functional.pad(weights, (0, 1), value=of_matrices)
        for group in self._groups:
            group.correct(weights, optimizer)


def _alike(targets: Iterable[_Rows]) -> Iterator[list[_Rows]]:
    """Rows that can be copied at once, in pieces that bound how much is copied at once."""
    groups: dict[Hashable, list[_Rows]] = {}
    elements: Counter[Hashable] = Counter()
    for rows in targets:
        held = rows.whole(rows.parameter)[rows.index]
        kind = (held.dtype, held.device, held.shape[1:], rows.weight.shape[1:], type(rows.index))
        if not held.numel():
            continue
        if kind in groups and elements[kind] + held.numel() > _MOST_ELEMENTS:
            yield groups.pop(kind)
            elements[kind] = 0
        groups.setdefault(kind, []).append(rows)
        elements[kind] += held.numel()
    yield from groups.values()
