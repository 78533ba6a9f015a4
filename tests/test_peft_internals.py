"""What PEFT does not document: there, or missing in one sentence; forward passes are seen in every version."""

from __future__ import annotations

import re
from importlib.metadata import version
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTuner
from tiny_models import LLAMA_TARGETS, random_batch, tiny_llama, with_lora

from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.discovery.gates import discover_gates
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.model_entry import entrance_of, root_of
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.peft_internals import (
    converted_config,
    is_adapted,
    is_left_by_merge,
    is_lora,
    is_refused,
    is_target,
    trains_tokens,
    with_all_linear,
)


def test_targets_are_resolved_as_peft_resolves_them() -> None:
    model = tiny_llama()
    resolved = with_all_linear(LoraConfig(target_modules="all-linear", exclude_modules=["down_proj"]), model)
    assert {name.rpartition(".")[2] for name in resolved.target_modules or ()} == {*LLAMA_TARGETS, "k_proj", "o_proj"}
    assert is_target(resolved, "model.layers.0.mlp.gate_proj")
    assert not is_target(resolved, "model.layers.0.mlp.down_proj")
    assert not is_target(resolved, "lm_head")
    assert not is_refused(model, "gate_proj")
    model.config.model_type = "falcon_mamba"
    assert is_refused(model, "out_proj")
    assert converted_config(LoraConfig(target_modules=["q_proj"]), tiny_llama()) is None


def test_a_missing_function_is_named_with_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(tuners_utils, "_maybe_include_all_linear_layers")
    expected = (
        f"peft {version('peft')} has no peft.tuners.tuners_utils._maybe_include_all_linear_layers, by which the "
        "targets of LoRA are resolved; install the version that is named in constraints.txt."
    )
    with pytest.raises(ConfigurationError) as caught:
        with_all_linear(LoraConfig(target_modules="all-linear"), tiny_llama())
    assert str(caught.value) == expected


def test_kinds_of_layers_are_told_and_a_missing_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"], trainable_token_indices=[1, 2])
    modules = dict(get_peft_model(tiny_llama(), config).base_model.model.named_modules())
    asked = (is_lora, is_adapted, trains_tokens, is_left_by_merge)
    told = {name: [ask(modules[name]) for ask in asked] for name in ("model.layers.0.self_attn.q_proj", "model.norm")}
    told["tokens"] = [ask(modules["model.embed_tokens"].token_adapter) for ask in asked]  # type: ignore[arg-type]
    assert told == {
        "model.layers.0.self_attn.q_proj": [True, True, False, True],
        "model.norm": [False, False, False, True],
        "tokens": [False, True, True, True],
    }
    assert [ask(modules["model.layers.0.mlp.up_proj"]) for ask in asked] == [False] * 4
    monkeypatch.delattr("peft.utils.other.AuxiliaryTrainingWrapper")
    expected = f"peft {version('peft')} has no peft.utils.other.AuxiliaryTrainingWrapper, by which layers with adapters"
    with pytest.raises(ConfigurationError, match=re.escape(expected)):
        is_left_by_merge(torch.nn.Linear(1, 1))


def _past_hooks(self: BaseTuner, *args: Any, **kwargs: Any) -> Any:
    return self.model.forward(*args, **kwargs)


def _through_hooks(self: BaseTuner, *args: Any, **kwargs: Any) -> Any:
    return self.model(*args, **kwargs)


def _trained(masked: bool) -> dict[str, torch.Tensor]:
    model = with_lora(tiny_llama(), LLAMA_TARGETS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    if masked:
        controller = GateController(model, discover_gates(model).require())
        controller.set_importance(ImportanceOptions(keep_fraction=0.5, warmup_steps=0))
        controller.attach([optimizer])
    for step in range(2):
        model(**random_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}


def test_training_is_the_same_whether_a_tuner_passes_hooks_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for forward in (_past_hooks, _through_hooks, BaseTuner.forward):
        monkeypatch.setattr(BaseTuner, "forward", forward)
        model = with_lora(tiny_llama(), LLAMA_TARGETS)
        assert (entrance_of(model) is root_of(model)) == ("forward" not in forward.__code__.co_names)
        seen: list[int] = []
        entrance_of(model).register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        model(**random_batch(0))
        assert seen == [7]
        states.append(_trained(masked=True))
    plain = _trained(masked=False)
    for other in states[1:]:
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())
    assert not all(torch.equal(value, plain[name]) for name, value in states[0].items())


def test_without_peft_around_it_the_model_is_its_own_entrance() -> None:
    model = tiny_llama()
    assert entrance_of(model) is model
