"""Which features of a tensor are the channels of a gate."""

from __future__ import annotations

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
