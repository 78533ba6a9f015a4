"""Finds gates whose activation is a function call between two linear layers, and no module."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from na_lora_lightning.core.discovery.blocks import Ancestors, Blocks, ancestors
from na_lora_lightning.core.discovery.functional_code import MIXED, Code
from na_lora_lightning.core.discovery.functional_probe import FunctionalGate
from na_lora_lightning.core.discovery.picked import origin_of
from na_lora_lightning.core.discovery.trace import LinearCall
from na_lora_lightning.core.lora_layers import active_adapters, is_lora_layer
from na_lora_lightning.core.pre_activations import LayerOutput
from na_lora_lightning.core.sites import GateMap, GateSite, LeftOut

# What autograd calls the functions that gates are made of,
_GATES = (
    *("Silu", "Gelu", "Relu", "LeakyRelu", "Prelu", "Rrelu", "Glu", "Sigmoid", "LogSigmoid", "Tanh", "Mish"),
    *("Softplus", "Elu", "Erf", "Hardswish", "Hardsigmoid", "Hardtanh", "Celu", "Softshrink", "Hardshrink"),
)
# and those that can also be something else.
_PERHAPS = ("Threshold", "Clamp", "Maximum", "Where", "Exp", "Sin", "Atan", "Abs")


@dataclass
class _Found:
    """The sites of one piece of code, or why it has none."""

    sites: list[GateSite] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def functional_gates(blocks: Blocks) -> GateMap:
    """The gates that no activation module shows.

    Args:
        blocks: Linear layers and activations of the model that was traced.

    Returns:
        Sites, and whatever else bends what a linear layer puts out on its way to another, and why it is not a site.
    """
    # By the calls of the layers, which may do something else each time.
    found: dict[tuple[LinearCall, ...], _Found] = {}
    known: dict[tuple[Any, ...], FunctionalGate | str | None] = {}
    for consumer in blocks.trace.linear_calls:
        met = blocks.inputs[id(consumer)]
        producers = blocks.linear_calls(met.leaves)
        names = tuple(producer.name for producer in producers)
        calls = tuple(producers)
        if not producers or not _bends(met, consumer) or (calls in found and found[calls].sites):
            continue
        reason = blocks.why_not_feed_forward(producers, consumer)
        if reason is not None:
            found.setdefault(calls, _Found(left_out=[LeftOut(names[0], "function", reason, producers=names)]))
            continue
        results = [_gate_of(blocks, producer, producers, consumer, known) for producer in producers]
        found[calls] = _Found(
            [result for result in results if isinstance(result, GateSite)],
            [result for result in results if isinstance(result, LeftOut)],
        )
    gates = GateMap(
        [site for each in found.values() for site in each.sites],
        list(dict.fromkeys(entry for each in found.values() for entry in each.left_out)),
    )
    gates.left_out += _leading_nowhere(blocks)
    layers: dict[str, set[nn.Module]] = defaultdict(set)
    for site in gates.sites:
        layers[site.name].add(site.lora_layer)
    for site in gates.sites:
        if len(layers[site.name]) > 1:
            # Layers that stand in separate lists have no other name in common.
            site.name = f"{site.lora_layer_name}.{site.activation.name}"
    return gates


def _leading_nowhere(blocks: Blocks) -> list[LeftOut]:
    """Activation functions of what a LoRA layer puts out whose results no linear layer takes that was called."""
    left_out = []
    for call in blocks.trace.function_calls:
        if blocks.leads_on(call):
            continue
        for producer in blocks.linear_calls(ancestors(call.node).leaves):
            if is_lora_layer(producer.module) and active_adapters(producer.module):
                reason = f"what {call.name} makes of {producer.name} is taken by no linear layer that is called"
                left_out.append(LeftOut(producer.name, call.name, reason, may_be_gate=True, producers=(producer.name,)))
    return list(dict.fromkeys(left_out))


def _bends(met: Ancestors, consumer: LinearCall) -> bool:
    return (
        met.custom
        or consumer.source.numel() in met.masks
        or any(name.startswith((*_GATES, *_PERHAPS)) for name in met.passed)
    )


def _gate_of(
    blocks: Blocks,
    producer: LinearCall,
    producers: list[LinearCall],
    consumer: LinearCall,
    known: dict[tuple[Any, ...], FunctionalGate | str | None],
) -> GateSite | LeftOut | None:
    if producer.output is None:
        return None
    code = Code(blocks, producer, producers, consumer)
    key = code.key()
    if key not in known:
        known[key] = code.identify()
    gate = known[key]
    if gate is None:
        return None
    with_lora = is_lora_layer(producer.module) and bool(active_adapters(producer.module))
    names = (producer.name,)
    between = f"the function between {producer.name} and {consumer.name}"
    met = blocks.inputs[id(consumer)]
    surely = not met.stops and (met.custom or any(name.startswith(_GATES) for name in met.passed))
    if isinstance(gate, str) or gate.activation is None:
        may_be = gate != MIXED if isinstance(gate, str) else gate.is_self_gated
        what = gate if isinstance(gate, str) else f"is {'of no known form' if may_be else 'not self-gated'}"
        return LeftOut(
            producer.name,
            "function",
            f"{between} {what}",
            not_supported=may_be and with_lora and surely,
            may_be_gate=may_be and with_lora and not surely,
            producers=names,
        )
    owner_name = _common_owner([producer.name, consumer.name, *(p.name for p in producers)])
    name = f"{owner_name}.{gate.activation.name}" if owner_name else gate.activation.name
    if not with_lora:
        reason = f"{producer.name} has no LoRA"
        return LeftOut(name, gate.activation.name, reason, gate_without_lora=True, producers=names)
    if met.stops:
        reason = f"{between} is multiplied with another activation"
        return LeftOut(name, gate.activation.name, reason, not_supported=True, producers=names)
    return GateSite(
        name=name,
        kind="gated" if len(producers) > 1 else gate.kind,
        activation=gate.activation,
        source=LayerOutput(producer.module, gate.channels),
        lora_layer_name=producer.name,
        lora_layer=producer.module,
        rows=gate.channels.features,
        output_layer_name=consumer.name,
        output_layer=consumer.module,
        picked_from=origin_of(producer),
    )


def _common_owner(names: list[str]) -> str:
    parts = [name.split(".") for name in names]
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)
