"""One model type through everything: LoRA, discovery, each row, and two training steps."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from zoo.expectations import MIXES_PADDING, MORE_INPUTS, NOT_CALLED, PADDING, REFUSALS, WITHOUT_SITE
from zoo.feed_forward import Blocks, find_blocks, has_linear_layers_alone
from zoo.row_check import row_problems
from zoo.statistics_check import statistics_problems
from zoo.tiny_models import TinyModel, quiet
from zoo.training_check import training_problems
from zoo.wrapping import LanguageSide, language_side, with_lora

from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.model_entry import root_of
from na_lora_lightning.core.sites import GateMap, LeftOut
from na_lora_lightning.errors import DataError, DiscoveryError


@dataclass
class Verdict:
    """What became of one model type.

    Attributes:
        mapping: The mapping of transformers.
        model_type: The model type.
        sites: Gate sites found.
        networks: Feed-forward networks that they stand for, each expert by itself.
        channels: Gate channels in all.
        activations: Names of their activations.
        kinds: ``"gated"``, ``"plain"`` or both.
        expected_blocks: Feed-forward blocks that the plain model has.
        found_blocks: Those that hold a site.
        rows_right: Whether every row looked at makes exactly its channel.
        trained: Whether the training steps moved exactly the kept rows.
        refused: Why the type was refused, or None.
        nothing_to_find: Whether it was refused for having no feed-forward block of linear layers alone.
        problems: What is wrong; empty for a type that is right or refused for a known reason.
        notes: Remarks.
        seconds: Time taken.
    """

    mapping: str
    model_type: str
    sites: int = 0
    networks: int = 0
    channels: int = 0
    activations: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    expected_blocks: int = 0
    found_blocks: int = 0
    rows_right: bool = False
    trained: bool = False
    refused: str | None = None
    nothing_to_find: bool = False
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def right(self) -> bool:
        """Whether everything is as it should be."""
        return self.rows_right and self.trained and self.refused is None and not self.problems


def check(tiny: TinyModel) -> Verdict:
    """Checks one model type.

    Args:
        tiny: The model, which is changed.

    Returns:
        What was found. An error of any kind is a problem, unless it is a refusal that is expected.
    """
    start = time.perf_counter()
    verdict = Verdict(tiny.mapping, tiny.model_type)
    with quiet():
        _check(tiny, verdict)
    verdict.seconds = time.perf_counter() - start
    return verdict


def _check(tiny: TinyModel, verdict: Verdict) -> None:
    side = language_side(tiny)
    more = MORE_INPUTS.get(tiny.model_type)
    inputs = {**tiny.inputs, **(more(tiny) if more is not None else {})}
    blocks = find_blocks(tiny.model, inputs, side)
    if tiny.model_type in NOT_CALLED and side.not_called:
        verdict.notes.append(f"without LoRA on what is called {NOT_CALLED[tiny.model_type][1]} alone")
    verdict.expected_blocks = len(blocks.expected)
    of_linear_layers = [
        name
        for name in {**blocks.expected, **blocks.unknown}
        if has_linear_layers_alone(tiny.model.get_submodule(name))
    ]
    try:
        model = with_lora(tiny, side)
        gates, options = _discover(model, inputs, side, verdict.notes)
    except Exception as error:
        _refuse(error, verdict)
        if verdict.nothing_to_find and of_linear_layers:
            verdict.problems.append(f"{of_linear_layers[0]} is a feed-forward block of linear layers alone")
        return
    verdict.sites = len(gates)
    verdict.networks = sum(site.networks for site in gates)
    verdict.channels = gates.channels
    verdict.activations = sorted({site.activation.name for site in gates})
    verdict.kinds = sorted({site.kind for site in gates})
    verdict.problems += _coverage(blocks, gates, verdict)
    root = root_of(model)
    wrong = [problem for site in gates for problem in row_problems(root, inputs, site)]
    verdict.problems += wrong
    verdict.rows_right = not wrong
    try:
        wrong = _train(model, gates, inputs, options, verdict)
    except DataError as error:
        _refuse(error, verdict)
        return
    verdict.problems += wrong
    verdict.trained = not wrong


def _refuse(error: Exception, verdict: Verdict) -> None:
    known = REFUSALS.get(verdict.model_type)
    if known is not None and known.message in str(error):
        verdict.refused = known.reason
        verdict.nothing_to_find = known.nothing_to_find
        return
    verdict.refused = f"{type(error).__name__}: {error}"
    verdict.problems.append(f"refused: {verdict.refused}")


def _discover(
    model: PeftModel, inputs: Mapping[str, Any], side: LanguageSide, notes: list[str]
) -> tuple[GateMap, dict[str, Any]]:
    """The gates, with the arguments that the callbacks need to find the same."""
    without_labels = {name: value for name, value in inputs.items() if name != "labels"}
    attempts: list[Mapping[str, Any] | None] = [None, without_labels, inputs]
    for example_inputs in attempts:
        options: dict[str, Any] = {} if example_inputs is None else {"example_inputs": example_inputs}
        try:
            gates = discover_gates(model, example_inputs)
            foreign = [entry for entry in gates.left_out if _is_foreign(entry, side)]
            if foreign:
                options["allow_unmasked_gates"] = True
                gates.left_out = [entry for entry in gates.left_out if entry not in foreign]
            gates.require()
            break
        except DiscoveryError:
            if example_inputs is inputs:
                raise
        except Exception:  # Whatever a model raises that the next arguments may suit; the last ones raise.
            if example_inputs is inputs or example_inputs is None:
                raise
    if "example_inputs" in options:
        with_labels = " with labels" if "labels" in options["example_inputs"] else ""
        notes.append(f"needs example_inputs{with_labels}")
    if "allow_unmasked_gates" in options:
        notes.append(f"allow_unmasked_gates for {len(foreign)} gates outside of the language side")
    return gates, options


def _is_foreign(entry: LeftOut, side: LanguageSide) -> bool:
    """A gate of a tower for images or sound, which has no LoRA here."""
    return entry.gate_without_lora and entry.name not in side


def _coverage(blocks: Blocks, gates: GateMap, verdict: Verdict) -> list[str]:
    """Compares the sites with the blocks of the plain model, both ways."""
    problems = [f"{name} ({kind}) computes activations and is on neither list" for name, kind in blocks.unknown.items()]
    covered = set()
    for site in gates:
        block = blocks.of(site.lora_layer_name)
        if block is None:
            problems.append(f"the site {site.name} is in no feed-forward block")
        else:
            covered.add(block)
    verdict.found_blocks = len(covered)
    explained = WITHOUT_SITE.get(verdict.model_type, {})
    for name in sorted(set(blocks.expected) - covered):
        if not any(re.fullmatch(pattern, name) for pattern in explained):
            functions = ", ".join(sorted(blocks.expected[name]))
            problems.append(f"the feed-forward block {name} ({functions}) has no site")
    return [*problems, *(f"the feed-forward block {name} was not run" for name in blocks.not_run)]


def _train(
    model: PeftModel, gates: GateMap, inputs: Mapping[str, Any], options: Mapping[str, Any], verdict: Verdict
) -> list[str]:
    root = root_of(model)
    if type(model.get_base_model()).__name__.startswith("Reformer"):
        # Its reversible layers cut the graph where their input needs no gradient.
        model.enable_input_require_grads()
    try:
        mixes = MIXES_PADDING.get(verdict.model_type)
        wrong = statistics_problems(root, inputs, gates.sites, verdict.notes, mixes is not None)
        if mixes is not None:
            verdict.notes.append(f"compared with the mask, as padding reaches real tokens through {mixes}")
        return [*wrong, *training_problems(model, gates, inputs, options, verdict.notes)]
    except DataError as error:
        wrong = [] if verdict.model_type in PADDING else [f"padding refused: {error}"]
        verdict.notes.append(f"trained without padding: {PADDING.get(verdict.model_type, error)}")
    whole = {name: value for name, value in inputs.items() if name != "attention_mask"}
    if "encoder_attention_mask" in whole:
        whole["encoder_attention_mask"] = torch.ones_like(whole["encoder_attention_mask"])
    if "decoder_input_ids" in whole or (getattr(root.config, "is_encoder_decoder", False) and "labels" in whole):
        whole["labels"] = whole["labels"].masked_fill(whole["labels"] < 0, 5)
    wrong += statistics_problems(root, whole, gates.sites, verdict.notes)
    return [*wrong, *training_problems(model, gates, whole, options, verdict.notes)]
