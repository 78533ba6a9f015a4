"""Finds the gates of a model with LoRA, from what its forward pass does rather than from its architecture's name.

A gate is an element-wise activation whose input comes from a linear layer and whose output, alone (*plain*) or
times another branch (*gated*), is consumed by a linear layer, token by token and from one common input. Its LoRA rows
are found by :mod:`na_lora_lightning.core.discovery.row_probe`. Stacked experts are the subject of
:mod:`na_lora_lightning.core.discovery.expert_gates`, activations that are not modules that of
:mod:`na_lora_lightning.core.discovery.functional_gates`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from na_lora_lightning.core.activations import Activation
from na_lora_lightning.core.discovery.activation_modules import activation_of, is_random
from na_lora_lightning.core.discovery.blocks import Blocks, Unadaptable
from na_lora_lightning.core.discovery.expert_gates import expert_gates, plain_name
from na_lora_lightning.core.discovery.functional_gates import functional_gates
from na_lora_lightning.core.discovery.picked import origin_of
from na_lora_lightning.core.discovery.probe_inputs import axes_told_apart, require_probe_inputs, what_to_give
from na_lora_lightning.core.discovery.row_probe import positional_rows, probe_rows, storage_rows
from na_lora_lightning.core.discovery.siblings import Repeats, one_site_for_rows, share_module, sites_of_siblings
from na_lora_lightning.core.discovery.token_order import set_token_order
from na_lora_lightning.core.discovery.trace import ActivationCall, LinearCall, Trace
from na_lora_lightning.core.discovery.tracing import trace_forward
from na_lora_lightning.core.discovery.undisturbed import undisturbed
from na_lora_lightning.core.discovery.unreached import parts_to_call, unreached
from na_lora_lightning.core.discovery.words_beside import set_sees_words
from na_lora_lightning.core.lora_layers import (
    active_adapters,
    is_lora_layer,
    require_lora,
    weight_b,
)
from na_lora_lightning.core.model_entry import root_of
from na_lora_lightning.core.model_parts import (
    branch_name,
    half_of,
    has_decoder,
    is_multimodal,
    language_model_name,
    part_of,
)
from na_lora_lightning.core.pre_activations import ActivationInput
from na_lora_lightning.core.sharding import Shards
from na_lora_lightning.core.sites import FoundBy, GateMap, GateSite, LeftOut
from na_lora_lightning.errors import DiscoveryError

_RANDOM = "it draws random numbers, so its derivative says nothing of a channel"


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
    with undisturbed(model):
        return _discover(model, root_of(model), example_inputs)


def _discover(model: nn.Module, root: nn.Module, example_inputs: Mapping[str, Any] | None) -> GateMap:
    trace = _trace(model, root, example_inputs)
    calls: dict[nn.Module, list[ActivationCall]] = defaultdict(list)
    for call in trace.activation_calls:
        calls[call.module].append(call)
    identified = _identify(calls, trace.shards)
    elementwise = {module: activation for module, activation in identified.items() if activation is not None}
    blocks = Blocks(root, trace, [call for module in elementwise for call in calls[module]])
    random = {module for module in elementwise if is_random(module)}
    activations = {module: activation for module, activation in elementwise.items() if module not in random}
    found, repeats = GateMap(), Repeats()
    for module, activation in elementwise.items():
        outside = [call for call in calls[module] if call.experts is None]
        results = [(call, result) for call in outside for result in _classify(call, activation, blocks)]
        results = repeats.left_out(results)
        sites = [result for _, result in results if isinstance(result, tuple)]
        left_out = [(call, result) for call, result in results if isinstance(result, LeftOut)]
        # A call without a graph (of a cycle that is not trained, say) is the gate's like the others.
        exclusive = all(call.output.grad_fn is None for call, _ in left_out)
        if module in random:
            # In training it is another function in each call.
            where = LeftOut(calls[module][0].name, activation.name, _RANDOM, not_supported=bool(sites))
            found.left_out.append(where)
            continue
        found.sites += share_module(sites, exclusive)
        if not sites:
            # One reason for a module, however often it is called.
            found.left_out += list(dict.fromkeys(reason for _, reason in left_out))
    for extra in (expert_gates(trace, activations), functional_gates(blocks)):
        found.sites += extra.sites
        found.left_out += extra.left_out
    found.sites, shared = one_site_for_rows(found.sites, root)
    found.left_out += shared
    _excuse_vectors(found, blocks)
    set_token_order(found.sites, root, trace)
    set_sees_words(found.sites, root, trace)
    called = {call.module for call in trace.linear_calls}
    siblings = sites_of_siblings(root, found.sites, called)
    found.sites += siblings
    called |= {site.lora_layer for site in siblings}
    _order(found, root)
    found.left_out += unreached(root, called.union(*({w for _, w in call.wrappers} for call in trace.experts_calls)))
    _assign_branches(found, root)
    return found


def _trace(model: nn.Module, root: nn.Module, example_inputs: Mapping[str, Any] | None) -> Trace:
    given = example_inputs is not None
    attempts = require_probe_inputs(root) if example_inputs is None else []
    if example_inputs is not None:
        whole = _on_device_of(root, example_inputs)
        attempts = [*axes_told_apart(whole), whole]
    for attempt, inputs in enumerate(attempts):
        try:
            return trace_forward(root, inputs, model, None if given else partial(parts_to_call, root))
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, AssertionError) as error:
            if attempt + 1 < len(attempts):
                continue
            remedy = f"pass example_inputs, {what_to_give(root)}"
            if given:
                remedy = "give example_inputs the names and shapes of one forward pass of this model"
            raise DiscoveryError(
                f"{type(root).__name__} does not take {' and '.join(inputs)} alone ({type(error).__name__}: {error}); "
                f"{remedy}."
            ) from error
    raise AssertionError("there is at least one attempt")


def _on_device_of(root: nn.Module, example_inputs: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(example_inputs, Mapping):
        raise DiscoveryError(
            f"example_inputs is a {type(example_inputs).__name__}, which says nothing of the arguments' names; give a "
            "dictionary of keyword arguments for one small forward pass."
        )
    device = next(root.parameters()).device
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in example_inputs.items()
    }


def _assign_branches(gates: GateMap, root: nn.Module) -> None:
    """Says of each site whose tokens it sees, and excuses parts of a multimodal model that have no LoRA at all."""
    multimodal = is_multimodal(root)
    language_model = language_model_name(root)
    for site in gates.sites:
        name = branch_name(root, language_model, site.lora_layer_name)
        half = half_of(root, site.lora_layer_name)
        if half is not None and (half[1] == "encoder" or not hasattr(root, "config")):
            name, site.shares_mask = half[0], True
        elif half is not None and has_decoder(root):
            name = None
        if multimodal:
            site.part = part_of(root, language_model, site.lora_layer_name)
        site.branch = None if name is None else root.get_submodule(name)
    if not multimodal:
        return
    with_lora = {branch_name(root, language_model, name) for name, m in root.named_modules() if is_lora_layer(m)}
    for index, entry in enumerate(gates.left_out):
        part = branch_name(root, language_model, plain_name(entry.producers[0])) if entry.gate_without_lora else None
        if entry.gate_without_lora and part not in with_lora:
            reason = f"its part of the model ({part or language_model or 'the text side'}) has no LoRA"
            gates.left_out[index] = replace(entry, gate_without_lora=False, reason=reason)


def _excuse_vectors(gates: GateMap, blocks: Blocks) -> None:
    """Excuses gates that tell a network of tokens the time, or the like, where none of these has LoRA."""
    calls = {call.name: call for call in blocks.trace.linear_calls}
    of_sites = [calls[site.lora_layer_name] for site in gates.sites if site.lora_layer_name in calls]
    if not any(call.source.ndim > 2 for call in of_sites) or any(blocks.is_of_vectors(call) for call in of_sites):
        return
    for index, entry in enumerate(gates.left_out):
        makers = [calls[name] for name in entry.producers if name in calls]
        if entry.gate_without_lora and makers and all(map(blocks.is_of_vectors, makers)):
            reason = "it acts on one vector for each sample, such as an embedding of time, and none of these has LoRA"
            gates.left_out[index] = replace(entry, gate_without_lora=False, reason=reason)


def _order(gates: GateMap, root: nn.Module) -> None:
    """Puts the sites in the order in which their LoRA layers stand in the model."""
    place = {name: index for index, (name, _) in enumerate(root.named_modules())}
    gates.sites.sort(key=lambda site: place[site.lora_layer_name])


def _identify(modules: Iterable[nn.Module], shards: Shards) -> dict[nn.Module, Activation | None]:
    """The activation that each module computes; modules alike in class and settings are looked at once."""
    alike: dict[tuple[type, str], Activation | None] = {}
    identified: dict[nn.Module, Activation | None] = {}
    for module in modules:
        key = (type(module), repr(module))
        if key not in alike or any(True for _ in module.parameters()):
            with shards.whole(*([module] if any(True for _ in module.parameters()) else [])):
                alike[key] = activation_of(module)
        identified[module] = alike[key]
    return identified


def _classify(call: ActivationCall, activation: Activation, blocks: Blocks) -> list[tuple[int, GateSite] | LeftOut]:
    """Decides what one call of an activation module is: its index and a site for each LoRA layer before it."""

    def left_out(reason: str, **details: Any) -> list[tuple[int, GateSite] | LeftOut]:
        return [LeftOut(call.name, activation.name, reason, **details)]

    block = blocks.of_activation(call)
    if isinstance(block, str):
        return left_out(str(block), not_supported=isinstance(block, Unadaptable))
    names = tuple(producer.name for producer in block.producers)
    with_lora = [p for p in block.producers if is_lora_layer(p.module) and active_adapters(p.module)]
    if not with_lora:
        return left_out(f"{', '.join(names)} has no LoRA", gate_without_lora=True, producers=names)
    sites: list[tuple[int, GateSite] | LeftOut] = []
    for producer in with_lora:
        with blocks.trace.shards.whole(producer.module):
            mapped = _map_rows(call, producer, alone=len(block.producers) == 1)
        if mapped is None:
            continue
        site = GateSite(
            name=call.name,
            kind=block.kind,
            activation=activation,
            source=ActivationInput(call.module),
            lora_layer_name=producer.name,
            lora_layer=producer.module,
            rows=mapped[0],
            output_layer_name=block.consumer.name,
            output_layer=block.consumer.module,
            found_by=mapped[1],
            picked_from=origin_of(producer),
        )
        sites.append((call.index, site))
    if sites:
        return sites
    return left_out(
        f"what makes it is not a linear layer: its channels are not one to one outputs of {', '.join(names)}",
        not_supported=True,
    )


def _map_rows(call: ActivationCall, producer: LinearCall, alone: bool) -> tuple[torch.Tensor, FoundBy] | None:
    adapter = active_adapters(producer.module)[0]
    weight = weight_b(producer.module, adapter)
    probed = probe_rows(call.pre_activation, weight) if weight.requires_grad else None
    stored = storage_rows(call.pre_activation, producer.output)
    if probed is not None and stored is not None and not torch.equal(probed, stored):
        raise DiscoveryError(
            f"two ways of mapping the gate {call.name!r} to rows of {producer.name!r} disagree, so its mask could hit "
            "the wrong channels; please report the model type, and exclude this layer from the LoRA targets."
        )
    if probed is not None:
        return probed, "probe"
    if stored is not None:
        return stored, "storage"
    placed = positional_rows(call.pre_activation, producer.output) if alone else None
    return None if placed is None else (placed, "position")
