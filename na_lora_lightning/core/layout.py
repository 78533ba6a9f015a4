"""The flat layout of the channels of all gate sites."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


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
        counts = torch.tensor(self.sizes, device=device)
        self.network_of_column = torch.arange(len(self.sizes), device=device).repeat_interleave(counts)

    def spread(self, per_network: Tensor) -> Tensor:
        """Repeats ``[..., networks]`` to ``[..., total]``."""
        return per_network.index_select(-1, self.network_of_column)


def _consecutive(sizes: Sequence[int]) -> tuple[slice, ...]:
    ends = list(itertools.accumulate(sizes))
    return tuple(slice(end - size, end) for size, end in zip(sizes, ends, strict=True))
