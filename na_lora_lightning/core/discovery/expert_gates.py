"""Finds the gates of stacked experts, with the rows of ``lora_B`` and the columns that each expert owns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from torch import Tensor, nn

from na_lora_lightning.core.activations import Activation, ElementwiseActivation
from na_lora_lightning.core.channels import take_features
from na_lora_lightning.core.discovery.activation_modules import name_of
from na_lora_lightning.core.discovery.functional_probe import identify
from na_lora_lightning.core.discovery.row_probe import probe_rows
from na_lora_lightning.core.discovery.trace import ActivationCall, ExpertsCall, Trace
from na_lora_lightning.core.experts import Arrangement, Experts, experts_of_rows, stacked_parameters
from na_lora_lightning.core.lora_layers import active_adapters, lora_b
from na_lora_lightning.core.pre_activations import GATE_METHOD, ActivationInput, GateMethod, PreActivationSource
from na_lora_lightning.core.sites import GateMap, GateSite, LeftOut

_ROUTED: tuple[Arrangement, ...] = ("sorted", "in_token_order")

_PEFT_OF_LAYOUT = (0, 19, 1)


@dataclass
class _Gate:
    """The gate of one experts module before its LoRA rows are known."""

    call: ExpertsCall
    name: str
    activation: Activation
    source: PreActivationSource
    kind: Literal["gated", "plain"]
    pre_activations: list[tuple[Tensor, int]] = field(default_factory=list)


def expert_gates(trace: Trace, activations: Mapping[nn.Module, Activation]) -> GateMap:
    """The gate sites of all stacked experts in a trace.

    Args:
        trace: A traced forward pass.
        activations: What the model's activation modules compute.

    Returns:
        Sites, and experts that were left out and why.
    """
    found = GateMap()
    known: dict[Any, tuple[Tensor, Experts] | None] = {}
    seen: set[nn.Module] = set()
    for call in trace.experts_calls:
        if call.owner in seen:
            continue
        seen.add(call.owner)
        gate = _gate_by_module(call, trace, activations)
        if gate is None or not gate.activation.self_gated:
            # The module may compute only a part of the activation.
            gate = _gate_by_method(call) or gate
        with trace.shards.whole(*(wrapper for _, wrapper in call.wrappers)):
            result = _site(gate, known) if gate is not None else _without_gate(call)
        if isinstance(result, GateSite):
            found.sites.append(result)
        elif result is not None:
            found.left_out.append(result)
    return found


def plain_name(name: str) -> str:
    """A module's name in the model without PEFT's wrappers around parameters."""
    return name.replace(".base_layer", "")


def _gate_by_module(call: ExpertsCall, trace: Trace, activations: Mapping[nn.Module, Activation]) -> _Gate | None:
    inside = [c for c in trace.activation_calls if c.experts is call and c.module in activations]
    if not inside:
        return None
    first = inside[0]
    gate = _Gate(call, first.name, activations[first.module], ActivationInput(first.module), _kind(call, first))
    gate.pre_activations = [(c.pre_activation, index) for index, c in enumerate(inside) if c.module is first.module]
    return gate


def _kind(call: ExpertsCall, activation: ActivationCall) -> Literal["gated", "plain"]:
    """Gated where one parameter makes twice the channels, or two make them."""
    channels = activation.pre_activation.shape[-1]
    shapes = [tuple(parameter.shape[1:]) for parameter in stacked_parameters(call.owner).values()]
    fused = any(2 * channels in shape for shape in shapes)
    return "gated" if fused or len(shapes) > 2 else "plain"


def _gate_by_method(call: ExpertsCall) -> _Gate | None:
    if call.gate_argument is None:
        return None
    like = call.gate_argument.detach()[:1].expand(64, -1)
    apply_gate = getattr(call.owner, GATE_METHOD)
    found = identify(apply_gate, like)
    if found is None:
        return None
    source = GateMethod(call.owner, found.channels)
    activation = found.activation or ElementwiseActivation(name_of(call.owner), found.function_of(apply_gate))
    gate = _Gate(call, f"{call.name}.{GATE_METHOD}", activation, source, "gated")
    gate.pre_activations = [(take_features(call.gate_argument, found.channels.features), 0)]
    return gate


def _without_gate(call: ExpertsCall) -> LeftOut | None:
    if not call.wrappers:
        return None
    reason = "the activation of these stacked experts is neither a module nor of a known form"
    return LeftOut(plain_name(call.name), "experts", reason, not_supported=True)


def _remedy_of_layout() -> str | None:
    """Older PEFT lays LoRA on stacked experts out otherwise."""
    try:
        installed = version("peft")
    except PackageNotFoundError:
        return None
    if tuple(map(int, re.findall(r"\d+", installed)[:3])) >= _PEFT_OF_LAYOUT:
        return None
    newer = ".".join(map(str, _PEFT_OF_LAYOUT))
    return f"upgrade peft {installed} to {newer} or newer, which has LoRA on stacked experts in another layout"


def _site(gate: _Gate, known: dict[Any, tuple[Tensor, Experts] | None]) -> GateSite | LeftOut:
    """The site of a gate; ``known`` keeps what was found out, as each gradient is as large as all experts together."""
    name = plain_name(gate.name)
    for wrapper_name, wrapper in gate.call.wrappers:
        for adapter in active_adapters(wrapper):
            weight: Tensor = lora_b(wrapper, adapter).weight  # type: ignore[assignment]
            if not weight.requires_grad:
                continue
            key = _kind_of_gate(gate, wrapper, weight)
            if key in known:
                mapped = known[key]
            elif not _reaches(gate, weight):
                continue
            else:
                mapped = known[key] = _map(gate, wrapper, weight)
            if mapped is None:
                what = f"{wrapper_name} ({wrapper.parameter_name})"
                reason = f"its channels and experts do not correspond to rows and columns of lora_B of {what}"
                return LeftOut(name, gate.activation.name, reason, not_supported=True, remedy=_remedy_of_layout())
            return GateSite(
                name=name,
                kind=gate.kind,
                activation=gate.activation,
                source=gate.source,
                lora_layer_name=wrapper_name,
                lora_layer=wrapper,
                rows=mapped[0],
                experts=replace(mapped[1], owner=gate.call.owner),
            )
    reason = "the stacked parameter that makes it has no LoRA"
    # The last one takes the gated result.
    makers = list(stacked_parameters(gate.call.owner))[:-1]
    producers = tuple(f"{plain_name(gate.call.name)}.{maker}" for maker in makers)
    return LeftOut(name, gate.activation.name, reason, gate_without_lora=True, producers=producers, target="parameters")


def _kind_of_gate(gate: _Gate, wrapper: nn.Module, weight: Tensor) -> tuple[Any, ...]:
    """What the rows of a gate can depend on: gates that are alike in this are alike."""
    z, owner = gate.pre_activations[0][0], gate.call.owner
    offset = z.storage_offset() if z._base is None else z.storage_offset() - z._base.storage_offset()
    layout = (offset, z.stride(), z.shape[-1], len(gate.pre_activations) > 1)
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in stacked_parameters(owner).items())
    return type(owner), shapes, wrapper.parameter_name, tuple(weight.shape), weight.dtype, layout


def _map(gate: _Gate, wrapper: nn.Module, weight: Tensor) -> tuple[Tensor, Experts] | None:
    """Rows of ``lora_B`` and arrangement of the experts; None where they cannot be made out."""
    rows = probe_rows(gate.pre_activations[0][0], weight)
    experts = None if rows is None else _experts(gate, weight, int(wrapper.num_experts))  # type: ignore[arg-type]
    return None if rows is None or experts is None else (rows, experts)


def _reaches(gate: _Gate, weight: Tensor) -> bool:
    z = gate.pre_activations[0][0]
    if z.grad_fn is None:
        return False
    return torch.autograd.grad(z, weight, torch.ones_like(z), retain_graph=True, allow_unused=True)[0] is not None


def _experts(gate: _Gate, weight: Tensor, count: int) -> Experts | None:
    """The arrangement of the rows of the pre-activation that the gradients of ``lora_B`` bear out."""
    z = gate.pre_activations[0][0]
    owner = gate.call.owner
    blocks = z.ndim == 3 and z.shape[0] == count
    for arrangement in ("one_block_each",) if blocks else _ROUTED:
        experts = Experts(count, owner, arrangement)
        if (blocks or gate.call.routed.index is not None) and _borne_out(experts, gate, weight):
            return experts
    return None


def _borne_out(experts: Experts, gate: _Gate, weight: Tensor) -> bool:
    """Whether a weight of e+1 on the rows of expert e scales the gradient of its columns ``e::E`` by e+1."""
    for z, index in gate.pre_activations:
        gate.call.routed.activations = index
        expert = experts_of_rows(experts, gate.call.routed, z)
        cotangent = torch.ones_like(z)
        (plain,) = torch.autograd.grad(z, weight, cotangent, retain_graph=True)
        factor = (expert + 1).to(z).view(*z.shape[:-1], 1)
        (weighted,) = torch.autograd.grad(z, weight, cotangent * factor, retain_graph=True)
        factors = torch.arange(1, experts.count + 1, device=weight.device).to(plain)
        expected = plain.view(plain.shape[0], -1, experts.count) * factors
        difference = (weighted.view_as(expected) - expected).abs().max()
        if not bool(difference <= 0.02 * expected.abs().max()):
            return False
    return True
