"""Keeps statistics in float32, whatever precision the model around them trains in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_precision(device: torch.device) -> Iterator[None]:
    """Arithmetic in the dtypes of its operands, and new tensors in float32.

    Hooks run inside of the training step, where autocast would multiply in 16 bits, and where Lightning's "bf16-true"
    has changed the dtype of new tensors, in which tokens cannot be counted beyond 256.

    Args:
        device: On which is computed.
    """
    default = torch.get_default_dtype()
    if default == torch.float32 and not torch.is_autocast_enabled(device.type):
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(default)
