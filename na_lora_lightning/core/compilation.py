"""What hooks need inside of a training step: to stay out of compiled graphs, and to compute in float32.

Dynamo reads a module's hooks while it compiles and does not look at them again. So graphs that were made without the
hooks are dropped when hooks come or go, and the hooks themselves run outside of graphs, as they do in eager mode.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

_REASON = "NA-LoRA reads gates between graphs; compile with fullgraph=False, or train without the NA-LoRA callbacks"

Hook = TypeVar("Hook", bound=Callable[..., Any])


def outside_of_graphs(hook: Hook) -> Hook:
    """The hook, left out of compiled graphs.

    Args:
        hook: A module's hook.

    Returns:
        The same function where nothing can have been compiled. Otherwise one that ends a graph and runs eagerly, and
        raises under ``fullgraph=True``.
    """
    if "torch._dynamo" not in sys.modules:
        return hook
    reason = {"reason": _REASON} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}
    disabled: Hook = torch.compiler.disable(hook, **reason)
    return disabled


def forget_graphs() -> None:
    """Makes compiled models compile again when they are next called, with the hooks that they have then."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["frames"]["total"]:
        torch.compiler.reset()


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
