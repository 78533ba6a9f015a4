"""Finds gates whose activation is a function call between two linear layers, and no module."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from na_lora_lightning.core.blocks import Blocks
from na_lora_lightning.core.functional import FunctionalGate, identify
from na_lora_lightning.core.lora_layers import active_adapters, is_lora_layer
from na_lora_lightning.core.pre_activations import LayerOutput
from na_lora_lightning.core.sites import GateMap, GateSite, LeftOut
from na_lora_lightning.core.tracing import LinearCall, evaluation_mode

# What autograd calls the functions that gates are made of.
_NONLINEAR = ("Silu", "Gelu", "Relu", "Sigmoid", "Tanh", "Mish", "Softplus", "Elu", "Erf", "Hardswish", "Celu")


def functional_gates(root: nn.Module, blocks: Blocks) -> GateMap:
    """The gates that no activation module shows.

    Args:
        root: The model that was traced.
        blocks: Its linear layers and activations.

    Returns:
        Sites, and gates that were left out and why.
    """
    found = GateMap()
    seen: set[tuple[str, ...]] = set()
    known: dict[tuple[Any, ...], FunctionalGate | None] = {}
    for consumer in blocks.trace.linear_calls:
        met = blocks.inputs[id(consumer)]
        producers = blocks.linear_calls(met.leaves)
        names = tuple(producer.name for producer in producers)
        if met.stops or not producers or names in seen or not any(n.startswith(_NONLINEAR) for n in met.passed):
            continue
        if blocks.why_not_feed_forward(producers, consumer) is not None:
            continue
        seen.add(names)
        results = [_gate_of(root, blocks, producer, producers, consumer, known) for producer in producers]
        found.sites += [result for result in results if isinstance(result, GateSite)]
        found.left_out += [result for result in results if isinstance(result, LeftOut)]
    return found


def _gate_of(
    root: nn.Module,
    blocks: Blocks,
    producer: LinearCall,
    producers: list[LinearCall],
    consumer: LinearCall,
    known: dict[tuple[Any, ...], FunctionalGate | None],
) -> GateSite | LeftOut | None:
    owner_name = _common_owner([producer.name, consumer.name, *(p.name for p in producers)])
    if owner_name not in blocks.trace.arguments or producer.output is None:
        return None
    owner = root.get_submodule(owner_name)
    key = (type(owner), repr(owner), producer.name[len(owner_name) :])
    if key not in known:
        with blocks.trace.shards.whole(owner):
            # A unit has to finish what it has begun.
            to_the_end = blocks.trace.shards.has_unit_in(owner)
            arguments = blocks.trace.arguments[owner_name]
            answer = _make_answer(owner, arguments, producer, producers, consumer, to_the_end)
            known[key] = identify(answer, producer.output.detach())
    gate = known[key]
    if gate is None:
        return None
    with_lora = is_lora_layer(producer.module) and bool(active_adapters(producer.module))
    if gate.activation is None:
        what = "of no known form" if gate.is_self_gated else "not self-gated"
        reason = f"the function between {producer.name} and {consumer.name} is {what}"
        unsupported = gate.is_self_gated and with_lora
        return LeftOut(producer.name, "function", reason, not_supported=unsupported, producers=(producer.name,))
    name = f"{owner_name}.{gate.activation.name}" if owner_name else gate.activation.name
    if not with_lora:
        reason = f"{producer.name} has no LoRA"
        return LeftOut(name, gate.activation.name, reason, gate_without_lora=True, producers=(producer.name,))
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
    )


def _common_owner(names: list[str]) -> str:
    parts = [name.split(".") for name in names]
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


class _ReachedError(Exception):
    """Ends a forward pass when the gated result is there."""


def _make_answer(
    owner: nn.Module,
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    producer: LinearCall,
    producers: list[LinearCall],
    consumer: LinearCall,
    to_the_end: bool,
) -> Callable[[Tensor], Tensor]:
    """Maps an output of ``producer`` to what ``consumer`` takes; the outputs of other producers are ones."""

    def answer(output: Tensor) -> Tensor:
        taken: list[Tensor] = []

        def replace(module: nn.Module, args: Any, result: Tensor) -> Tensor:
            return output.to(result.dtype) if module is producer.module else torch.ones_like(result)

        def take(module: nn.Module, args: Any) -> None:
            taken.append(args[0])
            if not to_the_end:
                raise _ReachedError

        with ExitStack() as stack:
            for other in producers:
                stack.callback(other.module.register_forward_hook(replace).remove)
            stack.callback(consumer.module.register_forward_pre_hook(take).remove)
            stack.enter_context(evaluation_mode(owner))
            with suppress(_ReachedError):
                owner(*arguments[0], **arguments[1])
        return taken[0].float()

    return answer
