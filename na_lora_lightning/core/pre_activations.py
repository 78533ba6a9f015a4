"""Where the pre-activation of a gate is read during training.

Most models compute an activation in a module, whose input is the pre-activation. Where a model calls a function
instead, the pre-activation is made again from the output of the layer before it, or, inside stacked experts, from
the argument of the method that applies the gate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from na_lora_lightning.core.channels import ChannelSlice
from na_lora_lightning.core.compilation import outside_of_graphs

Watcher = Callable[[Tensor], None]

GATE_METHOD = "_apply_gate"


class Handle(ABC):
    """Something that can be taken off a model again."""

    @abstractmethod
    def remove(self) -> None:
        """Takes it off."""


@dataclass(frozen=True)
class PreActivationSource(ABC):
    """A place in a model that sees a pre-activation.

    Attributes:
        module: The module that is watched.
    """

    module: nn.Module

    @abstractmethod
    def watch(self, watcher: Watcher) -> Handle | torch.utils.hooks.RemovableHandle:
        """Calls ``watcher(z)``, z ``[..., channels]``, in every forward pass, before the activation's output is used.

        Returns:
            A handle whose ``remove()`` ends it.
        """


@dataclass(frozen=True)
class ActivationInput(PreActivationSource):
    """The first positional input of an activation module."""

    def watch(self, watcher: Watcher) -> torch.utils.hooks.RemovableHandle:
        """See :meth:`PreActivationSource.watch`."""

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            # A copy of the model has its hooks.
            if module is self.module:
                watcher(args[0])

        return self.module.register_forward_pre_hook(outside_of_graphs(hook))


@dataclass(frozen=True)
class ActivationInputs(PreActivationSource):
    """The first positional inputs of several activation modules, all made by the same rows.

    Attributes:
        others: The modules beside the first.
    """

    others: tuple[nn.Module, ...]

    def watch(self, watcher: Watcher) -> Handle:
        """See :meth:`PreActivationSource.watch`."""
        return _Together([ActivationInput(module).watch(watcher) for module in (self.module, *self.others)])


@dataclass(frozen=True)
class _Together(Handle):
    handles: list[torch.utils.hooks.RemovableHandle]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@dataclass(frozen=True)
class LayerOutput(PreActivationSource):
    """The output of the layer before a functional activation.

    Attributes:
        channels: What of it is the pre-activation.
    """

    channels: ChannelSlice

    def watch(self, watcher: Watcher) -> torch.utils.hooks.RemovableHandle:
        """See :meth:`PreActivationSource.watch`."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if module is self.module:
                watcher(self.channels(output.detach()))

        return self.module.register_forward_hook(outside_of_graphs(hook))


@dataclass(frozen=True)
class GateMethod(PreActivationSource):
    """The argument of the method with which an experts module of transformers applies its gate.

    Attributes:
        channels: What of it is the pre-activation.
    """

    channels: ChannelSlice

    def watch(self, watcher: Watcher) -> Handle:
        """See :meth:`PreActivationSource.watch`."""
        seen = outside_of_graphs(lambda gate_up, output: watcher(self.channels(gate_up.detach())))
        return wrap_gate_method(self.module, seen)


class _WrappedGateMethod(Handle):
    def __init__(self, module: nn.Module, previous: Any) -> None:
        self._module = module
        self._previous = previous

    def remove(self) -> None:
        if self._previous is None:
            self._module.__dict__.pop(GATE_METHOD, None)
        else:
            self._module.__dict__[GATE_METHOD] = self._previous


def wrap_gate_method(module: nn.Module, seen: Callable[[Tensor, Tensor], None]) -> Handle:
    """Calls ``seen(argument, result)`` whenever ``module`` applies its gate.

    Args:
        module: An experts module with a method ``_apply_gate(gate_up)``.
        seen: Called after the method.

    Returns:
        A handle whose ``remove()`` restores the method.
    """
    previous = module.__dict__.get(GATE_METHOD)
    apply_gate: Callable[[Tensor], Tensor] = getattr(module, GATE_METHOD)

    def watched(gate_up: Tensor) -> Tensor:
        result = apply_gate(gate_up)
        seen(gate_up, result)
        return result

    # In the instance's dictionary it hides the method of the class.
    module.__dict__[GATE_METHOD] = watched
    return _WrappedGateMethod(module, previous)
