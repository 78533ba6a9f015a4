"""Finds the gates of a model with LoRA, from what its forward pass does rather than from its architecture's name.

A gate is an element-wise activation whose input comes from a linear layer and whose output, alone (*plain*) or
times another branch (*gated*), is consumed by a linear layer. Its LoRA rows are found by
:mod:`na_lora_lightning.core.row_probe`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from na_lora_lightning.core.activations import Activation, activation_of
from na_lora_lightning.core.lora_layers import (
    active_adapters,
    is_lora_layer,
    is_stacked_parameter,
    lora_b,
    require_lora,
)
from na_lora_lightning.core.row_probe import probe_rows, storage_rows
from na_lora_lightning.core.sites import GateMap, GateSite, LeftOut
from na_lora_lightning.core.tracing import ActivationCall, LinearCall, Trace, ancestors, trace_forward
from na_lora_lightning.errors import DiscoveryError

_PROBE_TOKENS = 4

Consumer = tuple[LinearCall, Literal["gated", "plain"]]


def root_of(model: nn.Module) -> nn.Module:
    """The model whose forward is always called: inside a ``PeftModel`` its base model, else the model itself."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def default_inputs(root: nn.Module) -> dict[str, Any]:
    """A few tokens for the probe.

    Args:
        root: A Hugging Face language model (its config has a vocabulary size).

    Returns:
        Keyword arguments for its forward: ``input_ids`` and ``attention_mask``, ``[1, 4]``, int64.

    Raises:
        DiscoveryError: The model is of another kind, so the caller must give inputs.
    """
    config = getattr(root, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    text_config = get_text_config() if callable(get_text_config) else config
    vocabulary = getattr(text_config, "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise DiscoveryError(
            f"{type(root).__name__} has no vocabulary size in its config, so no probe input can be made for it; pass "
            "example_inputs, a dictionary of keyword arguments for one small forward pass."
        )
    device = next(root.parameters()).device
    tokens = torch.arange(1, _PROBE_TOKENS + 1, device=device).remainder(vocabulary)[None]
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}


def discover_gates(model: nn.Module, example_inputs: Mapping[str, Any] | None = None) -> GateMap:
    """Finds every gate of a model and its rows in ``lora_B``.

    Args:
        model: A PEFT model, or any module that holds PEFT LoRA layers, in any dtype, on any device.
        example_inputs: Keyword arguments for one small forward pass of the model (of the base model inside a
            ``PeftModel``); made from the vocabulary when None.

    Returns:
        The gate sites in the order of the forward pass, and what was left out and why. Call
        :meth:`GateMap.require` to turn an empty or partial result into an error.

    Raises:
        DiscoveryError: The model holds no LoRA layer, no probe input can be made, or two ways of mapping the
            rows disagree.
    """
    require_lora(model)
    root = root_of(model)
    inputs = default_inputs(root) if example_inputs is None else example_inputs
    trace = trace_forward(root, inputs)
    calls: dict[nn.Module, list[ActivationCall]] = defaultdict(list)
    for call in trace.activation_calls:
        calls[call.module].append(call)
    activations = {module: activation for module, activation in _identify(calls).items() if activation is not None}
    nodes = {call.output.grad_fn for module in activations for call in calls[module]}
    linear_of_leaf, consumers = trace.linear_of_leaf(), _find_consumers(trace, nodes)
    found = GateMap(left_out=_stacked_experts(root))
    for module, activation in activations.items():
        results = [_classify(call, activation, linear_of_leaf, consumers) for call in calls[module]]
        sites = [result for result in results if isinstance(result, GateSite)]
        found.sites += _share_module(results) if len(results) > 1 else sites
        # One reason for a module, however often it is called.
        found.left_out += list(dict.fromkeys(result for result in results if isinstance(result, LeftOut)))
    return found


def _stacked_experts(root: nn.Module) -> list[LeftOut]:
    """LoRA on stacked expert parameters, whose gates are not mapped."""
    reason = "LoRA on stacked expert parameters is not supported yet"
    return [
        LeftOut(name, "experts", reason, not_supported=True)
        for name, module in root.named_modules()
        if is_stacked_parameter(module)
    ]


def _share_module(results: list[GateSite | LeftOut]) -> list[GateSite]:
    """Sites of one activation module that is called several times: one site for each LoRA layer it follows."""
    shared: dict[int, GateSite] = {}
    for index, result in enumerate(results):
        if not isinstance(result, GateSite):
            continue
        known = shared.setdefault(id(result.lora_layer), result)
        if not torch.equal(known.rows, result.rows):
            raise DiscoveryError(
                f"the gate {result.name!r} uses different rows of {result.lora_layer_name!r} in different calls; "
                "exclude this layer from the LoRA targets."
            )
        known.calls = frozenset({index}) | (known.calls or frozenset())
    return list(shared.values())


def _identify(modules: Iterable[nn.Module]) -> dict[nn.Module, Activation | None]:
    """The activation that each module computes; modules alike in class and settings are looked at once."""
    alike: dict[tuple[type, str], Activation | None] = {}
    identified: dict[nn.Module, Activation | None] = {}
    for module in modules:
        key = (type(module), repr(module))
        if key not in alike or any(True for _ in module.parameters()):
            alike[key] = activation_of(module)
        identified[module] = alike[key]
    return identified


def _classify(
    call: ActivationCall,
    activation: Activation,
    linear_of_leaf: dict[int, LinearCall],
    consumers: dict[Any, Consumer],
) -> GateSite | LeftOut:
    """Decides what one call of an activation module is."""

    def left_out(reason: str, **details: Any) -> LeftOut:
        return LeftOut(call.name, activation.name, reason, **details)

    leaves = ancestors(call.pre_activation.grad_fn).leaves
    producers = [linear_of_leaf[id(leaf)] for leaf in leaves if id(leaf) in linear_of_leaf]
    if not producers or call.output.grad_fn not in consumers:
        return left_out("it does not stand between two linear layers")
    consumer, kind = consumers[call.output.grad_fn]
    names = tuple(producer.name for producer in producers)
    with_lora = [p for p in producers if is_lora_layer(p.module) and active_adapters(p.module)]
    if not with_lora:
        return left_out(f"{', '.join(names)} has no LoRA", gate_without_lora=True, producers=names)
    for producer in with_lora:
        mapped = _map_rows(call, producer)
        if mapped is not None:
            rows, found_by = mapped
            return GateSite(
                name=call.name,
                kind=kind,
                activation=activation,
                activation_module=call.module,
                lora_layer_name=producer.name,
                lora_layer=producer.module,
                rows=rows,
                output_layer_name=consumer.name,
                output_layer=consumer.module,
                found_by=found_by,
            )
    return left_out(f"its channels do not correspond one to one to outputs of {', '.join(names)}")


def _find_consumers(trace: Trace, nodes: set[Any]) -> dict[Any, Consumer]:
    """For each activation's graph node, the linear layer that takes its output, and whether another branch joins.

    One walk per linear layer, from its input back to the activations, serves all activations.
    """
    consumers: dict[Any, Consumer] = {}
    for linear in trace.linear_calls:
        met = ancestors(linear.input_node, stop_at=nodes)
        # Another branch shows as a leaf that is reached without passing the activation.
        multiplied = bool(met.leaves) and any(name.startswith("MulBackward") for name in met.passed)
        for node in met.stops:
            consumers.setdefault(node, (linear, "gated" if multiplied else "plain"))
    return consumers


def _map_rows(call: ActivationCall, producer: LinearCall) -> tuple[Tensor, Literal["probe", "storage"]] | None:
    adapter = active_adapters(producer.module)[0]
    weight: Tensor = lora_b(producer.module, adapter).weight  # type: ignore[assignment]
    probed = probe_rows(call.pre_activation, weight) if weight.requires_grad else None
    stored = storage_rows(call.pre_activation, producer.output)
    if probed is not None and stored is not None and not torch.equal(probed, stored):
        raise DiscoveryError(
            f"two ways of mapping the gate {call.name!r} to rows of {producer.name!r} disagree, so its mask could hit "
            "the wrong channels; please report the model type, and exclude this layer from the LoRA targets."
        )
    if probed is not None:
        return probed, "probe"
    return None if stored is None else (stored, "storage")
