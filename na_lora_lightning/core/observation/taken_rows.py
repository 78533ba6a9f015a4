"""Looked-at rows of pre-activations, kept until many sites can be evaluated at once.

What an evaluation costs on a GPU is the number of its operations, not of its elements, so rows of sites that share an
activation wait for one another. They wait for so many elements at most, and as many are evaluated at once at most.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from na_lora_lightning.core.activations import Activation

_MOST_ELEMENTS = 1 << 22
# So that intermediate values stay in its cache: twice as many take half as long again.
_MOST_ELEMENTS_ON_CPU = 1 << 19


@dataclass(frozen=True)
class RowsOfSite:
    """Rows of one call of an activation.

    Attributes:
        index: Of the site.
        activation: Of the site.
        rows: z, ``[tokens, channels]``.
        weight: How many tokens each row stands for in each network, or 0, ``[networks, tokens]`` float32.
    """

    index: int
    activation: Activation
    rows: Tensor
    weight: Tensor

    @property
    def kind(self) -> Hashable:
        """Equal for those that can be evaluated together."""
        return self.activation, self.rows.shape, self.rows.dtype, self.rows.device, len(self.weight)

    def pieces(self) -> Iterator[RowsOfSite]:
        """The rows in parts that can be evaluated at once, all of them in one where that is possible."""
        tokens = max(1, most_elements(self.rows.device) // self.rows.shape[1])
        for rows, weight in zip(self.rows.split(tokens), self.weight.split(tokens, dim=1), strict=True):
            yield RowsOfSite(self.index, self.activation, rows, weight)


@dataclass(frozen=True)
class Batch:
    """Rows of several sites that are evaluated at once.

    Attributes:
        sites: Index of each site.
        activation: Of all of them.
        rows: z, ``[sites, tokens, channels]`` float32.
        weight: ``[sites, networks, tokens]`` float32.
    """

    sites: list[int]
    activation: Activation
    rows: Tensor
    weight: Tensor

    @classmethod
    def of(cls, taken: list[RowsOfSite]) -> Batch:
        """Stacks rows of one kind."""
        first = taken[0].weight
        if all(each.weight.data_ptr() == first.data_ptr() for each in taken):
            weight = first.expand(len(taken), *first.shape)
        else:
            weight = torch.stack([each.weight for each in taken])
        rows = torch.cat([each.rows for each in taken]) if len(taken) > 1 else taken[0].rows
        stacked = rows.float().unflatten(0, (len(taken), -1))
        return cls([each.index for each in taken], taken[0].activation, stacked, weight)

    def add_to(self, sums: Tensor, places: Sequence[slice], collected: Tensor) -> None:
        """Adds what was collected, sites that lie side by side at once.

        Args:
            sums: ``[components, columns]`` of all sites.
            places: Columns of each of all sites.
            collected: ``[components, columns]`` of the batch's sites.
        """
        collected, width = collected.to(sums.device), collected.shape[1] // len(self.sites)
        begin = 0
        for end in range(1, len(self.sites) + 1):
            if end == len(self.sites) or self.sites[end] != self.sites[end - 1] + 1:
                columns = slice(places[self.sites[begin]].start, places[self.sites[end - 1]].stop)
                sums[:, columns].add_(collected[:, begin * width : end * width])
                begin = end


class TakenRows:
    """Rows that wait."""

    def __init__(self) -> None:
        self._by_kind: dict[Hashable, list[RowsOfSite]] = {}
        self._elements = 0

    def add(self, taken: RowsOfSite, pre_activation: Tensor) -> Iterator[Batch]:
        """Takes rows in, and hands out those that waited long enough.

        Args:
            taken: The rows.
            pre_activation: Where they were taken from, which may change when this ends.
        """
        elements, most = taken.rows.numel(), most_elements(taken.rows.device)
        if self._elements + elements > most:
            yield from self.take_all()
        if elements > most:
            for piece in taken.pieces():
                yield Batch.of([piece])
            return
        if taken.rows.data_ptr() == pre_activation.data_ptr():
            taken = RowsOfSite(taken.index, taken.activation, taken.rows.clone(), taken.weight)
        self._by_kind.setdefault(taken.kind, []).append(taken)
        self._elements += elements

    def take_all(self) -> Iterator[Batch]:
        """Hands out all that wait."""
        waiting, self._by_kind, self._elements = self._by_kind, {}, 0
        for taken in waiting.values():
            yield Batch.of(taken)

    def clear(self) -> None:
        """Forgets what waits."""
        self._by_kind, self._elements = {}, 0


def most_elements(device: torch.device) -> int:
    """Elements that wait, and that are evaluated at once, at most."""
    return _MOST_ELEMENTS_ON_CPU if device.type == "cpu" else _MOST_ELEMENTS
