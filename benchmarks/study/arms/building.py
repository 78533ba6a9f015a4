"""Builds an arm around a base model: its adapter, optimizer, gates, mechanisms and hook."""

from __future__ import annotations

import copy
import hashlib
import importlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from benchmarks.study import StudyError
from benchmarks.study.arms.hooks import HOOKS, BuiltArm
from benchmarks.study.cells import Arm
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.lora_layers import is_linear, is_lora_layer
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.core.sites import GateMap

ALL_LINEAR, FEED_FORWARD = "all-linear", "ffn"
# Cells are named after where their hooks were when they ran, and keep their names.
_MOVED = {
    "benchmarks.study.candidates": "benchmarks.study.arms.candidates",
    "benchmarks.study.dora_layers": "benchmarks.study.arms.hooks",
    "benchmarks.study.temporal_candidates": "benchmarks.study.arms.hooks",
}


def target_names(base: PreTrainedModel, targets: str) -> str | list[str]:
    """LoRA targets for ``"all-linear"`` or ``"ffn"``, the layers of feed-forward blocks.

    Raises:
        StudyError: Another word is given.
    """
    if targets == ALL_LINEAR:
        return targets
    if targets != FEED_FORWARD:
        raise StudyError(f"the LoRA targets are {targets!r}; choose {ALL_LINEAR!r} or {FEED_FORWARD!r}.")
    return [name for name, module in base.named_modules() if is_linear(module) and ".mlp." in name]


def _names_of_gates(
    base: PreTrainedModel, targets: str | list[str], example_inputs: Mapping[str, Tensor] | None
) -> list[str]:
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(r=1, target_modules=copy.copy(targets)))
    gates = discover_gates(adapted, example_inputs)
    return sorted({site.lora_layer_name.rpartition("base_model.model.")[2] for site in gates})


def initialise_a(model: nn.Module, seed: int) -> None:
    """Draws each A as PEFT does (Kaiming-uniform), from a generator of the seed and the layer's name.

    An arm that leaves some layers out, or adds parameters that draw random numbers, so starts from the same A in the
    layers that it shares with the others.
    """
    for name, module in model.named_modules():
        if is_lora_layer(module):
            for matrix in module.lora_A.values():
                own = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
                drawn = torch.empty(matrix.weight.shape)
                nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=torch.Generator().manual_seed(own))
                matrix.weight.data.copy_(drawn)


def adapt(
    base: PreTrainedModel,
    arm: Arm,
    lora: Mapping[str, Any],
    steps: int,
    seed: int,
    example_inputs: Mapping[str, Tensor] | None = None,
) -> PeftModel:
    """Wraps the base model with the arm's adapter.

    Args:
        base: The base model; it is changed in place.
        arm: The arm.
        lora: ``rank``, ``alpha`` and ``targets``.
        steps: Optimizer steps of the run, for AdaLoRA's schedule.
        seed: The cell's seed.
        example_inputs: As :func:`build` takes them.

    Raises:
        StudyError: The method is unknown.
    """
    torch.manual_seed(seed)
    targets = target_names(base, lora["targets"])
    common: dict[str, Any] = {"lora_alpha": lora["alpha"], "target_modules": targets, "task_type": "CAUSAL_LM"}
    if type(base).__name__.startswith("GPT2"):
        common["fan_in_fan_out"] = True
    if arm.without_gates:
        common["exclude_modules"] = _names_of_gates(base, targets, example_inputs)
    if arm.method == "adalora":
        schedule = {"tinit": steps // 10, "tfinal": steps // 3, "deltaT": max(1, steps // 50), "total_step": steps}
        ranks = {"target_r": lora["rank"], "init_r": math.ceil(1.5 * lora["rank"])}
        return get_peft_model(base, AdaLoraConfig(**(common | ranks | schedule | dict(arm.peft))))
    if arm.method != "lora":
        raise StudyError(f"the method {arm.method!r} does not exist; choose 'lora' or 'adalora'.")
    # With PEFT's own layers, so that a cell has the same bits whenever it is made again.
    model = get_peft_model(base, LoraConfig(**({"r": lora["rank"]} | common | dict(arm.peft))))
    if arm.peft.get("init_lora_weights", True) is True:
        initialise_a(model, seed)
    return model


def make_optimizer(model: PeftModel, arm: Arm, lora: Mapping[str, Any], rate: float, weight_decay: float) -> Optimizer:
    """The arm's optimizer.

    Raises:
        StudyError: It is unknown.
    """
    options = {"lr": rate, "weight_decay": weight_decay} | dict(arm.optimizer_options)
    if arm.optimizer == "adamw":
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trainable, **options)
    if arm.optimizer == "lora_plus":
        return create_loraplus_optimizer(model, torch.optim.AdamW, **({"loraplus_lr_ratio": 16.0} | options))
    if arm.optimizer == "lora_fa":
        return create_lorafa_optimizer(model, r=lora["rank"], lora_alpha=lora["alpha"], **options)
    raise StudyError(f"the optimizer {arm.optimizer!r} does not exist; choose 'adamw', 'lora_plus' or 'lora_fa'.")


def build(
    base: PreTrainedModel,
    arm: Arm,
    lora: Mapping[str, Any],
    training: Mapping[str, Any],
    rate: float,
    seed: int,
    example_inputs: Mapping[str, Tensor] | None = None,
) -> BuiltArm:
    """Builds an arm around a fresh base model.

    Args:
        base: The base model; it is changed in place.
        arm: The arm.
        lora: ``rank``, ``alpha`` and ``targets``.
        training: How the cell is trained.
        rate: Its learning rate.
        seed: Its seed.
        example_inputs: Of a forward pass that reaches all of the model, where a few tokens do not: with images.
    """
    model = adapt(base, arm, lora, training["steps"], seed, example_inputs)
    model.train()
    optimizer = make_optimizer(model, arm, lora, rate, training["weight_decay"])
    controller = None
    gates = GateMap() if arm.method == "adalora" else discover_gates(model, example_inputs)
    if arm.importance is not None or arm.step_scale is not None:
        options = arm.options_of(seed)
        controller = GateController(model, gates.require(), ObserverOptions(**options["observer"]))
        if arm.importance is not None:
            controller.set_importance(ImportanceOptions(**options["importance"]))
        if arm.step_scale is not None:
            controller.set_step_scale(StepScaleOptions(**options["step_scale"]))
    hook = arm.hook or ("adalora" if arm.method == "adalora" else None)
    built = BuiltArm(model, optimizer, gates, controller, [])
    if hook is not None:
        built.hooks.append(hook_class(hook)(built, **arm.hook_options))
    # After the hooks, so that those see the optimizer's step before the mechanisms change it.
    if controller is not None:
        controller.attach([optimizer])
    return built


def hook_class(name: str) -> Any:
    """The hook of a name.

    Raises:
        StudyError: The name is no name of a hook.
    """
    if name in HOOKS:
        return HOOKS[name]
    module, separator, attribute = name.partition(":")
    if not separator:
        raise StudyError(f"the hook {name!r} does not exist; choose one of {', '.join(HOOKS)}, or give 'module:Class'.")
    return getattr(importlib.import_module(_MOVED.get(module, module)), attribute)
