"""What optimizers are wrapped in, and how they skip a step."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer


def stepping_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose ``step`` moves the parameters, inside of wrappers such as accelerate's."""
    inner = getattr(optimizer, "optimizer", None)
    return stepping_optimizer(inner) if isinstance(inner, Optimizer) else optimizer


def skips_by_itself(optimizer: Optimizer) -> bool:
    """Whether the step under way moves nothing, after an overflow.

    A fused optimizer is called by a ``GradScaler`` in any case and told of the overflow; others are not called then.
    """
    overflow = getattr(optimizer, "found_inf", None)
    return isinstance(overflow, Tensor) and bool(overflow)
