"""Which features of a tensor are the channels of a gate, and the flat layout of the channels of all gates."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChannelSlice:
    """How a pre-activation is made from what a layer puts out: z = clamp(output[..., features]).

    Attributes:
        features: Output feature of each channel, ``[channels]``, int64 on the CPU.
        lowest: Lower end of the clamp, or None.
        highest: Upper end of the clamp, or None.
    """

    features: Tensor
    lowest: float | None = None
    highest: float | None = None

    def __call__(self, output: Tensor) -> Tensor:
        """z, ``[..., channels]``, from ``[..., features]``."""
        z = take_features(output, self.features)
        return z if self.lowest is None and self.highest is None else z.clamp(self.lowest, self.highest)


def as_slice(index: Tensor) -> slice | None:
    """The index ``[n]`` as a slice where it is evenly spaced and ascending, else None."""
    first, last = int(index[0]), int(index[-1])
    step = 1 if index.numel() == 1 else (last - first) // (index.numel() - 1)
    if step < 1 or not torch.equal(index, torch.arange(first, last + 1, step)):
        return None
    return slice(first, last + 1, step)


def take_features(values: Tensor, features: Tensor) -> Tensor:
    """``values[..., features]``, as a view where the features are evenly spaced."""
    evenly = as_slice(features)
    return values[..., evenly] if evenly is not None else values[..., features.to(values.device)]


class Layout:
    """Places of the sites' columns in a flat buffer; a site of stacked experts has a network for each of them.

    Args:
        sites: Number of networks of each site, and columns of each of its networks.
        device: Where the index tensors live.

    Attributes:
        sizes: Columns of each network.
        slices: Where each network's columns lie.
        site_slices: Where each site's columns lie.
        site_networks: Which networks are each site's.
        total: Number of columns.
        network_of_column: Network index of each column, ``[total]``, int64.
    """

    def __init__(self, sites: Sequence[tuple[int, int]], device: torch.device) -> None:
        self.sizes = tuple(columns for networks, columns in sites for _ in range(networks))
        self.slices = _consecutive(self.sizes)
        self.site_slices = _consecutive([networks * columns for networks, columns in sites])
        self.site_networks = _consecutive([networks for networks, _ in sites])
        self.total = sum(self.sizes)
        counts = torch.tensor(self.sizes, dtype=torch.int64, device=device)
        self.network_of_column = torch.arange(len(self.sizes), device=device).repeat_interleave(counts)

    def spread(self, per_network: Tensor) -> Tensor:
        """Repeats ``[..., networks]`` to ``[..., total]``."""
        return per_network.index_select(-1, self.network_of_column)

    def over_networks(self, values: Tensor, reduction: Callable[[Tensor], Tensor]) -> Tensor:
        """Reduces each network's columns, those of networks of one size at once.

        Args:
            values: ``[..., total]``.
            reduction: From ``[..., networks of a size, columns]`` to ``[..., networks of a size]``.

        Returns:
            ``[..., networks]``.
        """
        return _reduced(values, self.sizes, reduction)

    def over_sites(self, values: Tensor, reduction: Callable[[Tensor], Tensor]) -> Tensor:
        """The same for the columns of each site's networks together, to ``[..., sites]``."""
        return _reduced(values, [columns.stop - columns.start for columns in self.site_slices], reduction)


def runs(sizes: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Stretches of equal sizes one after another: where each lies in a flat buffer, and the size."""
    start = 0
    for size, equal in itertools.groupby(sizes):
        stop = start + size * len(list(equal))
        yield slice(start, stop), size
        start = stop


def _reduced(values: Tensor, sizes: Sequence[int], reduction: Callable[[Tensor], Tensor]) -> Tensor:
    parts = [reduction(values[..., where].unflatten(-1, (-1, size))) for where, size in runs(sizes)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _consecutive(sizes: Sequence[int]) -> tuple[slice, ...]:
    ends = list(itertools.accumulate(sizes))
    return tuple(slice(end - size, end) for size, end in zip(sizes, ends, strict=True))
