"""One traced forward pass in which every linear layer starts a graph of its own.

Each linear layer's input is replaced by a fresh leaf, so the autograd graph between two linear layers stands
alone: what makes a pre-activation, and what consumes an activation, can be read from it without interference
through the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from na_lora_lightning.core.discovery.probe_inputs import samples_of
from na_lora_lightning.core.discovery.trace import (
    ActivationCall,
    ExpertsCall,
    FunctionCall,
    LinearCall,
    ModuleCall,
    Trace,
)
from na_lora_lightning.core.experts import expert_owners, routed_call, stacked_parameters
from na_lora_lightning.core.lora_layers import is_linear, is_lora_layer
from na_lora_lightning.core.pre_activations import GATE_METHOD, wrap_gate_method
from na_lora_lightning.core.sharding import Shards

# Those that make gates in the models at hand.
ACTIVATION_FUNCTIONS = (functional.silu, functional.gelu, functional.relu, torch.relu, Tensor.relu)


def _outer_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Named modules of ``root`` without the inside of LoRA layers; that of LoRA on stacked experts is included."""
    inside: tuple[str, ...] = ()
    for name, module in root.named_modules():
        if inside and name.startswith(inside):
            continue
        if is_lora_layer(module):
            hidden = ("lora_",) if stacked_parameters(_innermost(module)) else ("lora_", "base_layer")
            inside = (*inside, *(f"{name}.{prefix}" for prefix in hidden))
        yield name, module


def _innermost(layer: nn.Module) -> nn.Module:
    while isinstance(getattr(layer, "base_layer", None), nn.Module):
        layer = layer.base_layer  # type: ignore[assignment]
    return layer


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a layer of one input is given, with or without its name; None where it is given nothing."""
    return args[0] if args else next(iter(kwargs.values()), None)


class _Recorder:
    """The hooks that fill a trace."""

    def __init__(self, shards: Shards) -> None:
        self.trace = Trace(shards)
        self._experts: list[ExpertsCall] = []
        self._within: list[ModuleCall] = []

    def cut_input(self, name: str) -> Callable[..., Any]:
        """A pre-hook for a linear layer that starts a new graph at its input."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            source = first_argument(args, kwargs)
            if not (isinstance(source, Tensor) and source.is_floating_point()):
                return None
            leaf = source.detach().requires_grad_(True)
            within = tuple(self._within)
            indices = tuple(call.linear_calls[module] for call in within)
            for call in within:
                call.linear_calls[module] += 1
            self.trace.linear_calls.append(LinearCall(name, module, source, leaf, within, indices))
            return ((leaf, *args[1:]), kwargs) if args else ((), {**kwargs, next(iter(kwargs)): leaf})

        return hook

    def keep_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A hook for a linear layer."""
        for call in reversed(self.trace.linear_calls):
            if call.module is module:
                call.output = output if isinstance(output, Tensor) else None
                return

    def enter_experts(self, name: str, wrappers: list[tuple[str, nn.Module]]) -> Callable[..., Any]:
        """A pre-hook for a module of stacked experts."""

        def hook(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = ExpertsCall(name, owner, wrappers, routed_call(args, kwargs))
            self.trace.experts_calls.append(call)
            self._experts.append(call)
            # No gradient reaches the input, so that no product keeps the experts' adapted weights for it.
            return ((args[0].detach(), *args[1:]), kwargs) if args and isinstance(args[0], Tensor) else None

        return hook

    def leave_experts(self, owner: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A hook for a module of stacked experts, which ends their graph: it holds their adapted weights."""
        self._experts.pop()
        return output.detach() if isinstance(output, Tensor) else None

    def keep_gate(self, argument: Tensor, result: Tensor) -> None:
        """Called when experts apply their gate by a method."""
        if self._experts:
            self._experts[-1].gate_argument = argument

    def enter_module(self, name: str) -> Callable[..., None]:
        """A pre-hook for a module with children."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = ModuleCall(name, module, args, kwargs)
            self.trace.module_calls.append(call)
            self._within.append(call)

        return hook

    def leave_module(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A hook for a module with children."""
        while self._within and self._within.pop().module is not module:
            # Calls within it that an error has ended.
            continue

    def keep_call(self, name: str) -> Callable[..., None]:
        """A hook for a childless module."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            index = self.trace.call_counts[module]
            self.trace.call_counts[module] += 1
            if not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor)):
                return
            if not (args[0].is_floating_point() and args[0].shape == output.shape):
                return
            experts = self._experts[-1] if self._experts else None
            before = sum(call.experts is experts for call in self.trace.activation_calls) if experts else 0
            self.trace.activation_calls.append(ActivationCall(name, module, index, args[0], output, experts, before))

        return hook


class _FunctionCalls(TorchFunctionMode):
    """Keeps calls of activation functions."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in ACTIVATION_FUNCTIONS and isinstance(result, Tensor) and result.grad_fn is not None:
            self._trace.function_calls.append(FunctionCall(func.__name__, result.grad_fn))
        return result


def trace_forward(
    root: nn.Module,
    inputs: Mapping[str, Any],
    model: nn.Module | None = None,
    more: Callable[[set[nn.Module]], Iterable[tuple[nn.Module, Mapping[str, Any]]]] | None = None,
) -> Trace:
    """Runs one forward pass of ``root`` and records linear layers, stacked experts and childless modules.

    Call it where the model is :func:`~na_lora_lightning.core.discovery.undisturbed.undisturbed`. Hooks are taken
    off afterwards.

    Args:
        root: Model with LoRA layers.
        inputs: Keyword arguments of its forward.
        model: What is around it and passes these arguments on to it, which matters where parameters are sharded.
        more: Parts of the model to be called afterwards, given the linear layers that were called, and keyword
            arguments for each; an error in one of them ends it.

    Returns:
        The trace, whose tensors hold the graph until it is dropped.
    """
    shards = Shards(model or root)
    recorder = _Recorder(shards)
    recorder.trace.inputs, recorder.trace.samples = inputs, samples_of(inputs)
    owners = {owner: (name, wrappers) for name, owner, wrappers in expert_owners(root)}
    wrapping = {wrapper for _, wrappers in owners.values() for _, wrapper in wrappers}
    with ExitStack() as stack:
        for name, module in _outer_modules(root):
            if module in owners:
                enter = recorder.enter_experts(*owners[module])
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(recorder.leave_experts, always_call=True).remove)
                if hasattr(module, GATE_METHOD):
                    stack.callback(wrap_gate_method(module, recorder.keep_gate).remove)
            elif module in wrapping:
                continue
            elif is_lora_layer(module) or is_linear(module):
                cut = recorder.cut_input(name)
                stack.callback(module.register_forward_pre_hook(cut, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(recorder.keep_output).remove)
            elif any(True for _ in module.children()):
                enter = recorder.enter_module(name)
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(recorder.leave_module, always_call=True).remove)
            else:
                stack.callback(module.register_forward_hook(recorder.keep_call(name)).remove)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_FunctionCalls(recorder.trace))
        shards.entry(root)(**inputs)
        for part, arguments in more({call.module for call in recorder.trace.linear_calls}) if more is not None else ():
            with suppress(Exception):
                part(**arguments)
    shards.reshard()
    return recorder.trace
