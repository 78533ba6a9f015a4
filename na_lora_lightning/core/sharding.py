"""Parameters that FSDP2 shards over processes: which rows a process owns, and how a layer is seen whole.

``fully_shard`` turns modules into units. Between uses, each process holds some rows of a unit's parameters; for a
forward pass the unit gathers all of them. Everything here does nothing for a model without units.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from na_lora_lightning.errors import UpdateError


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is distributed over processes (a ``DTensor``)."""
    # Nothing can be one before the module is imported, and importing it takes a second.
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(parameter, distributed.DTensor)


def local_part(parameter: Tensor) -> Tensor:
    """The rows that this process holds, ``[own rows, ...]``, in the parameter's own memory and without a graph."""
    if not is_sharded(parameter):
        return parameter.detach()
    sharded: Any = parameter
    with torch.no_grad():
        # Looked up at each use: loading a checkpoint may move it.
        part: Tensor = sharded.to_local()
    return part


def local_rows(parameter: Tensor, name: str) -> range:
    """Which rows of a parameter this process holds.

    Args:
        parameter: ``[rows, ...]``, sharded on its first dimension or not at all.
        name: Its name, for the message.

    Returns:
        The rows of :func:`local_part` by their number in the whole parameter; empty where the process has none.

    Raises:
        UpdateError: It is distributed in another way.
    """
    if not is_sharded(parameter):
        return range(len(parameter))
    sharded: Any = parameter
    placements = sharded.placements
    # A subclass stands for rows that do not lie side by side.
    by_rows = [placement for placement in placements if type(placement).__name__ == "Shard" and placement.dim == 0]
    if len(by_rows) > 1 or any(p not in by_rows and not p.is_replicate() for p in placements):
        raise UpdateError(
            f"{name} is distributed as {', '.join(map(str, placements))}, from which the rows of its gate channels "
            "cannot be told; shard it with fully_shard() on its first dimension, without tensor parallelism."
        )
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, placements)
    return range(offset[0], offset[0] + shape[0]) if shape[0] else range(0)


class Shards:
    """The units of a model.

    Args:
        model: The model that is called: the PEFT model, or what is inside it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # A parameter is gathered by the innermost unit around its module.
        self._unit_of: dict[nn.Module, Any] = {}
        fsdp = sys.modules.get("torch.distributed.fsdp")
        if fsdp is not None and hasattr(fsdp, "FSDPModule"):
            self._assign(model, None, fsdp.FSDPModule)

    def _assign(self, module: nn.Module, around: Any, kind: type) -> None:
        unit = module if isinstance(module, kind) else around
        if unit is not None:
            self._unit_of[module] = unit
        for child in module.children():
            self._assign(child, unit, kind)

    def around(self, module: nn.Module) -> list[nn.Module]:
        """The units that hold a module, itself included, the outermost first."""
        units = set(self._unit_of.values())
        return [unit for unit in self._model.modules() if unit in units and any(m is module for m in unit.modules())]

    def entry(self, root: nn.Module) -> nn.Module:
        """What is to be called to run ``root``: the outermost unit around it, which has to come first, or itself."""
        return next(iter(self.around(root)), root)

    def __bool__(self) -> bool:
        return bool(self._unit_of)

    def has_unit_in(self, module: nn.Module) -> bool:
        """Whether a module is a unit or holds one."""
        return any(self._unit_of.get(inner) is inner for inner in module.modules())

    def require_gathered(self, parameter: Tensor, name: str) -> None:
        """Checks that a trained parameter is gathered by a unit, or that there is none.

        Raises:
            UpdateError: It is not sharded in a model that is, or it is distributed in another way.
        """
        if self and not is_sharded(parameter):
            raise UpdateError(
                f"{name} is not sharded though the model around it is, so nothing averages its gradient over "
                "processes; call fully_shard() on the whole PEFT model, without ignored_params."
            )
        if is_sharded(parameter) and not self:
            raise UpdateError(
                f"{name} is distributed over processes and no fully_shard() gathers it, so a process sees some "
                "channels of the gates alone; shard the PEFT model with fully_shard(), without tensor parallelism."
            )

    @contextmanager
    def whole(self, *modules: nn.Module) -> Iterator[None]:
        """Gathers the parameters of modules and of what is inside them; every process has to take part."""
        inside = dict.fromkeys(inner for module in modules for inner in module.modules())
        units = dict.fromkeys(self._unit_of[inner] for inner in inside if inner in self._unit_of)
        after_backward = {unit: _reshards_after_backward(unit) for unit in units}
        for unit in units:
            # A gradient through a unit's output counts as a backward pass, after which the next one would find nothing.
            unit.set_reshard_after_backward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit, reshards in after_backward.items():
                unit.set_reshard_after_backward(reshards, recurse=False)
                unit.reshard()

    def reshard(self) -> None:
        """Lets each process keep its own rows alone, so that modules hold the parameters that optimizers step.

        A forward pass without a backward pass leaves the outermost unit gathered.
        """
        for unit in dict.fromkeys(self._unit_of.values()):
            unit.reshard()


def _reshards_after_backward(unit: Any) -> bool:
    """What ``set_reshard_after_backward`` was last told; there is no public way to ask."""
    state = unit._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return all(getattr(group, "reshard_after_backward", True) for group in groups)
