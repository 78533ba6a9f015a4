"""One traced forward pass in which every linear layer starts a graph of its own.

Each linear layer's input is replaced by a fresh leaf, so the autograd graph between two linear layers stands
alone: what makes a pre-activation, and what consumes an activation, can be read from it without interference
through the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from na_lora_lightning.core.lora_layers import is_linear, is_lora_layer


@dataclass(eq=False)
class LinearCall:
    """One call of a linear (or LoRA) layer: its fresh leaf, the graph that led to its input, its output."""

    name: str
    module: nn.Module
    leaf: Tensor
    input_node: Any
    output: Tensor | None = None


@dataclass(eq=False)
class ActivationCall:
    """One call of a childless module that maps a floating tensor to one of the same shape."""

    name: str
    module: nn.Module
    pre_activation: Tensor
    output: Tensor


@dataclass
class Trace:
    """What happened in the traced forward pass, in order."""

    linear_calls: list[LinearCall] = field(default_factory=list)
    activation_calls: list[ActivationCall] = field(default_factory=list)

    def linear_of_leaf(self) -> dict[int, LinearCall]:
        """Maps ``id`` of a leaf to its linear call."""
        return {id(call.leaf): call for call in self.linear_calls}


def _outer_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Named modules of ``root`` without the inside of LoRA layers."""
    inside: tuple[str, ...] = ()
    for name, module in root.named_modules():
        if inside and name.startswith(inside):
            continue
        if is_lora_layer(module):
            inside = (*inside, f"{name}.")
        yield name, module


@contextmanager
def evaluation_mode(root: nn.Module) -> Iterator[None]:
    """Sets evaluation mode for all modules and restores each module's own mode afterwards."""
    modes = {module: module.training for module in root.modules()}
    root.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def trace_forward(root: nn.Module, inputs: Mapping[str, Any]) -> Trace:
    """Runs one forward pass of ``root`` and records linear layers and childless modules.

    Evaluation mode, random state and hooks are restored afterwards; no parameter's ``grad`` is touched.

    Args:
        root: Model with LoRA layers.
        inputs: Keyword arguments of its forward.

    Returns:
        The trace, whose tensors hold the graph until it is dropped.
    """
    trace = Trace()

    def cut_input(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not (args and isinstance(args[0], Tensor) and args[0].is_floating_point()):
                return None
            leaf = args[0].detach().requires_grad_(True)
            trace.linear_calls.append(LinearCall(name, module, leaf, args[0].grad_fn))
            return (leaf, *args[1:])

        return hook

    def keep_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for call in reversed(trace.linear_calls):
            if call.module is module:
                call.output = output if isinstance(output, Tensor) else None
                return

    def keep_call(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor)):
                return
            if args[0].is_floating_point() and args[0].shape == output.shape and output.grad_fn is not None:
                trace.activation_calls.append(ActivationCall(name, module, args[0], output))

        return hook

    with ExitStack() as stack:
        for name, module in _outer_modules(root):
            if is_lora_layer(module) or is_linear(module):
                stack.callback(module.register_forward_pre_hook(cut_input(name)).remove)
                stack.callback(module.register_forward_hook(keep_output).remove)
            elif not any(True for _ in module.children()):
                stack.callback(module.register_forward_hook(keep_call(name)).remove)
        device = next(root.parameters()).device
        devices = [device] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(evaluation_mode(root))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        root(**inputs)
    return trace


@dataclass
class Ancestors:
    """What a walk backwards through an autograd graph meets.

    Attributes:
        leaves: Leaf tensors.
        passed: Names of the node types passed.
        stops: Nodes at which the walk stopped.
    """

    leaves: list[Tensor] = field(default_factory=list)
    passed: set[str] = field(default_factory=set)
    stops: list[Any] = field(default_factory=list)


def ancestors(node: Any, stop_at: Container[Any] = ()) -> Ancestors:
    """Walks an autograd graph backwards.

    Args:
        node: Graph node to start from (``tensor.grad_fn``), or None.
        stop_at: Nodes that are noted and not passed.

    Returns:
        What was met.
    """
    met = Ancestors()
    seen: set[Any] = set()
    pending = [node] if node is not None else []
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in stop_at:
            met.stops.append(current)
            continue
        variable = getattr(current, "variable", None)
        if variable is not None:
            met.leaves.append(variable)
            continue
        met.passed.add(type(current).__name__)
        pending.extend(parent for parent, _ in current.next_functions if parent is not None)
    return met
