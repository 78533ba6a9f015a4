"""Looks at a gate site during a forward pass, and moves the parameters behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from na_lora_lightning.core.pre_activations import ActivationInput, GateMethod
from na_lora_lightning.core.sites import GateSite


@dataclass
class Seen:
    """What one forward pass showed of a site, call by call, each ``[tokens, channels]``.

    Attributes:
        pre_activations: z of each of the site's calls.
        results: Gated results.
        activated: What the activation module returned.
    """

    pre_activations: list[Tensor] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)
    activated: list[Tensor] = field(default_factory=list)


def flat(values: Tensor) -> Tensor:
    """A copy ``[tokens, channels]``."""
    return values.detach().reshape(-1, values.shape[-1]).clone()


def lora_b(site: GateSite) -> Tensor:
    """B of the default adapter, ``[out, r]`` or ``[out, r·E]``."""
    layer: Any = site.lora_layer
    weight: Tensor = layer.lora_B["default"].weight
    return weight


@contextmanager
def evaluating(root: nn.Module) -> Iterator[None]:
    """In evaluation mode and with the same random numbers each time."""
    training = {module: module.training for module in root.modules()}
    root.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def look(root: nn.Module, inputs: Mapping[str, Any], site: GateSite) -> Seen:
    """What a forward pass shows of a site."""
    seen = Seen()
    calls = 0

    def see(z: Tensor) -> None:
        nonlocal calls
        if site.calls is None or calls in site.calls:
            seen.pre_activations.append(flat(z))
        calls += 1

    with ExitStack() as stack:
        stack.callback(site.source.watch(see).remove)
        if isinstance(site.source, ActivationInput) and site.calls is None:
            keep = site.source.module.register_forward_hook(lambda m, args, out: seen.activated.append(flat(out)))
            stack.callback(keep.remove)
        if isinstance(site.source, GateMethod):
            stack.enter_context(_watched_gate_method(site.source.module, seen.results.append))
        elif site.output_layer is not None:
            keep = site.output_layer.register_forward_pre_hook(lambda m, args: seen.results.append(flat(args[0])))
            stack.callback(keep.remove)
        stack.enter_context(evaluating(root))
        stack.enter_context(torch.no_grad())
        root(**inputs)
    return seen


@contextmanager
def _watched_gate_method(owner: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Shows what the method returns with which experts apply their gate."""
    apply_gate: Any = owner._apply_gate
    hidden = owner.__dict__.get("_apply_gate")

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = apply_gate(*args, **kwargs)
        see(flat(result))
        return result

    owner.__dict__["_apply_gate"] = watched
    try:
        yield
    finally:
        if hidden is None:
            del owner.__dict__["_apply_gate"]
        else:
            owner.__dict__["_apply_gate"] = hidden


@contextmanager
def _restored(parameter: Tensor) -> Iterator[None]:
    kept = parameter.detach().clone()
    try:
        with torch.no_grad():
            yield
    finally:
        with torch.no_grad():
            parameter.copy_(kept)


@contextmanager
def moved_row(site: GateSite, channel: int, expert: int | None, size: float) -> Iterator[None]:
    """Adds ``size`` to the row of a channel, for stacked experts to the columns of one."""
    weight = lora_b(site)
    columns = slice(None) if expert is None else slice(expert, None, site.networks)
    with _restored(weight):
        weight[int(site.rows[channel]), columns] += size
        yield


@contextmanager
def moved_matrix(site: GateSite, expert: int) -> Iterator[None]:
    """Adds noise to the matrix of one expert in the parameter that makes the pre-activation."""
    layer: Any = site.lora_layer
    parameter = getattr(layer.get_base_layer(), layer.parameter_name)
    with _restored(parameter):
        parameter[expert] += torch.randn(parameter.shape[1:], generator=torch.Generator().manual_seed(0))
        yield


def rows_of_experts(root: nn.Module, inputs: Mapping[str, Any], site: GateSite, before: Seen) -> list[Tensor]:
    """For each expert, which rows of all pre-activations it makes, ``[rows]``; found by moving its own matrix."""
    found = []
    for expert in range(site.networks):
        with moved_matrix(site, expert):
            found.append(changed_rows(before, look(root, inputs, site)))
    return found


def changed_rows(before: Seen, after: Seen) -> Tensor:
    """Which rows of all pre-activations differ, ``[rows]``."""
    calls = zip(before.pre_activations, after.pre_activations, strict=True)
    return torch.cat([(one != other).any(dim=1) for one, other in calls])
