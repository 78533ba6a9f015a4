"""Leaves a model, and every source of random numbers, as they were before a probe ran it."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

# What torch keeps on a module for itself.
_OF_TORCH = frozenset(vars(nn.Module()))
# Integers beyond this number are quantised weights, which no forward pass changes.
_LARGE = 1 << 20


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


@contextmanager
def same_random_state(root: nn.Module) -> Iterator[None]:
    """Restores the random state of torch, on the CPU, wherever the model is and on CUDA, of NumPy and of Python."""
    numpy: Any = sys.modules.get("numpy")
    of_python, of_numpy = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices: dict[str, set[int]] = {}
    for tensor in (*root.parameters(), *root.buffers()):
        if tensor.device.type not in ("cpu", "meta"):
            devices.setdefault(tensor.device.type, set()).add(tensor.device.index or 0)
    if torch.cuda.is_initialized():
        # Offloaded layers run where they do not lie.
        devices["cuda"] = set(range(torch.cuda.device_count()))
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind, indices in devices.items():
            stack.enter_context(torch.random.fork_rng(devices=sorted(indices), device_type=kind))
        try:
            yield
        finally:
            random.setstate(of_python)
            if of_numpy is not None:
                numpy.random.set_state(of_numpy)


@contextmanager
def nothing_computed_again() -> Iterator[None]:
    """Has torch's checkpoints keep what they are given to compute: the graph is looked at, and hooks are in place."""

    def kept(*args: Any, **kwargs: Any) -> Iterator[None]:
        yield

    class Kept:
        @staticmethod
        def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
            return function(*args)

    with ExitStack() as stack:
        # Neither is documented; without them a checkpoint is a checkpoint.
        for name, other in (("_checkpoint_without_reentrant_generator", kept), ("CheckpointFunction", Kept)):
            if hasattr(checkpoint, name):
                stack.callback(setattr, checkpoint, name, getattr(checkpoint, name))
                setattr(checkpoint, name, other)
        yield


@contextmanager
def undisturbed(root: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode, and everything back afterwards that running it may change.

    That is: the mode of each module, its buffers and other attributes, ``grad`` and ``requires_grad`` of parameters,
    and the state of random number generators.

    Args:
        root: The model.
    """
    restore = [_keep_parameters(root), _keep_buffers(root), *(_keep_attributes(module) for module in root.modules())]
    # Its kernels for evaluation work on nested tensors, in which tokens stand elsewhere than in training.
    fast = torch.backends.mha.get_fastpath_enabled()
    with same_random_state(root), evaluation_mode(root), nothing_computed_again():
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for undo in restore:
                undo()


def _keep_parameters(root: nn.Module) -> Callable[[], None]:
    kept = [(parameter, parameter.grad, parameter.requires_grad) for parameter in root.parameters()]

    def undo() -> None:
        for parameter, grad, requires_grad in kept:
            if parameter.grad is not grad:
                parameter.grad = grad
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)

    return undo


def _keep_buffers(root: nn.Module) -> Callable[[], None]:
    kept = [(m, dict(m._buffers), set(m._non_persistent_buffers_set)) for m in root.modules()]
    values = {
        id(buffer): (buffer, buffer.detach().clone())
        for _, buffers, _ in kept
        for buffer in buffers.values()
        if buffer is not None and not buffer.is_meta and (buffer.is_floating_point() or buffer.numel() <= _LARGE)
    }

    def undo() -> None:
        for module, buffers, not_saved in kept:
            module._buffers.clear()
            module._buffers.update(buffers)
            module._non_persistent_buffers_set = not_saved
        with torch.no_grad():
            for buffer, value in values.values():
                if not torch.equal(buffer, value):
                    buffer.copy_(value)

    return undo


def _is_result(value: Any) -> bool:
    """Tensors, numbers and names; not flags, which say what a library has installed once and for all."""
    return isinstance(value, (Tensor, int, float, str)) and not isinstance(value, bool)


def _keep_attributes(module: nn.Module) -> Callable[[], None]:
    """Keeps what a module remembers of its calls in attributes (caches, counters, lists of outputs), and its children.

    BigBird, say, exchanges its attention for another when it is given few tokens.
    """
    children = dict(module._modules)
    kept = {name: value for name, value in vars(module).items() if name not in _OF_TORCH}
    contents = [(value, value.copy()) for value in kept.values() if type(value) in (list, dict, set)]
    tensors = [(value, value.detach().clone()) for value in kept.values() if type(value) is Tensor and value.is_leaf]
    generators = [(value, value.get_state()) for value in kept.values() if isinstance(value, torch.Generator)]

    def undo() -> None:
        module._modules.update({name: child for name, child in children.items() if name in module._modules})
        for name, value in list(vars(module).items()):
            if name in kept and value is not kept[name] and (_is_result(value) or _is_result(kept[name])):
                module.__dict__[name] = kept[name]
            elif name not in kept and name not in _OF_TORCH and _is_result(value):
                del module.__dict__[name]
        for container, content in contents:
            if isinstance(container, list):
                container[:] = content
            else:
                container.clear()
                container.update(content)
        with torch.no_grad():
            for tensor, value in tensors:
                if not tensor.is_meta and not torch.equal(tensor, value):
                    tensor.copy_(value)
        for generator, state in generators:
            generator.set_state(state)

    return undo
