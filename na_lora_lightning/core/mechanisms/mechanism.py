"""What the mechanisms share."""

from __future__ import annotations

import torch
from torch import Tensor


def moving_average(average: Tensor, value: Tensor, valid: Tensor, beta: float) -> Tensor:
    """β·average + (1−β)·value where ``valid``, and ``average`` elsewhere; all of one shape.

    The average starts at zero. Averaging ones in the same way gives its total weight, 1 − β^t after t valid steps,
    and the quotient is the bias-corrected average.
    """
    return torch.where(valid, torch.lerp(value, average, beta), average)
