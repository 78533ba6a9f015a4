"""Where a foreign project keeps its network with LoRA: found, or named as the reason why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foreign_modules import (
    PLAIN_CHANNELS,
    PLAIN_EXAMPLE,
    BuiltLate,
    Delegating,
    Distilled,
    Held,
    Injected,
    LayersOnTheModule,
    PlainModule,
    PlainNetwork,
    plain_injected_network,
    plain_loader,
)
from lightning.pytorch import Callback, LightningModule
from lightning_models import (
    assert_equal_states,
    check,
    loader,
    lora_state,
    make_trainer,
    tiny_peft_model,
)
from torch import Tensor, nn

from na_lora_lightning import GateImportanceCallback, StepScaleCallback
from na_lora_lightning.callbacks.model_search import find_peft_model
from na_lora_lightning.errors import ConfigurationError, DiscoveryError

pytestmark = [
    # Lightning's advice, and what it says of trainers as odd as these.
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback"),
    pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch"),
    pytest.mark.filterwarnings("ignore:.*is not set. This can cause"),
]


def _as_attribute(module: Held, model: nn.Module) -> None:
    module.anything = model


def _in_a_module_list(module: Held, model: nn.Module) -> None:
    module.models = nn.ModuleList([nn.Linear(1, 1).requires_grad_(False), model])


def _twice(module: Held, model: Any) -> None:
    module.base = model.get_base_model()
    module.anything = model


@pytest.mark.parametrize(
    ("hold", "get"),
    [
        (_as_attribute, lambda module: module.anything),
        (_in_a_module_list, lambda module: module.models[1]),
        (_twice, lambda module: module.anything),
    ],
)
def test_a_peft_model_anywhere_in_the_module(tmp_path: Path, hold: Any, get: Any) -> None:
    check(tmp_path, lambda: Held(hold, get))


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_a_model_that_is_built_late(tmp_path: Path, hook: str) -> None:
    check(tmp_path, lambda: BuiltLate(hook))


@pytest.mark.parametrize("how", ["add_adapter", "inject_adapter_in_model"])
def test_lora_without_a_peft_model(tmp_path: Path, how: str) -> None:
    module, _ = check(tmp_path, lambda: Injected(how))
    assert find_peft_model(module) is module.model


def test_a_module_that_hands_on_attributes(tmp_path: Path) -> None:
    check(tmp_path, Delegating)


def test_a_frozen_teacher_beside_the_student(tmp_path: Path) -> None:
    module, _ = check(tmp_path, Distilled)
    assert find_peft_model(module) is module.model


@pytest.mark.parametrize("make_module", [PlainModule, lambda: PlainModule(plain_injected_network()), LayersOnTheModule])
def test_networks_that_are_not_hugging_face(tmp_path: Path, make_module: Callable[[], LightningModule]) -> None:
    _, importance = check(tmp_path, make_module, plain_loader, example_inputs=PLAIN_EXAMPLE)
    assert importance.controller is not None
    assert [(site.name.split(".")[-1], site.channels) for site in importance.controller.gates] == [
        ("activation", PLAIN_CHANNELS)
    ]


def test_examples_are_compared_by_value(tmp_path: Path) -> None:
    def callbacks(other: Tensor) -> list[Callback]:
        return [
            GateImportanceCallback(example_inputs=PLAIN_EXAMPLE),
            StepScaleCallback(example_inputs={"features": other}),
        ]

    same = PLAIN_EXAMPLE["features"].clone()
    make_trainer(tmp_path, callbacks=callbacks(same), fast_dev_run=True).fit(PlainModule(), plain_loader())
    with pytest.raises(ConfigurationError, match="different values of example_inputs"):
        make_trainer(tmp_path, callbacks=callbacks(same + 1), fast_dev_run=True).fit(PlainModule(), plain_loader())


def _fit_refused(folder: Path, module: LightningModule, data: Any = None) -> None:
    """A fit that has to stop before the first batch, and leaves no hook."""
    before = lora_state(module)
    make_trainer(folder, callbacks=[GateImportanceCallback(), StepScaleCallback()]).fit(module, data or loader())
    assert_equal_states(before, lora_state(module))


@pytest.mark.parametrize(
    ("hold", "name"),
    [
        (lambda module, model: setattr(module, "models", [model]), r"models\[0\]"),
        (lambda module, model: setattr(module, "models", {"policy": (1, model)}), r"models\['policy'\]\[1\]"),
        (lambda module, model: setattr(module, "holder", SimpleNamespace(inner=model)), r"holder\.inner"),
    ],
)
def test_a_model_that_lightning_does_not_see_is_named(tmp_path: Path, hold: Any, name: str) -> None:
    message = rf"Held\.{name} holds a PEFT model .* use nn.ModuleList or nn.ModuleDict"
    module = Held(hold, lambda module: tiny_peft_model("llama"))
    # Lightning makes the optimizer before callbacks can look.
    with pytest.raises(ValueError, match="empty parameter list"), pytest.warns(UserWarning, match=message):
        _fit_refused(tmp_path, module)
    module.visible = nn.Linear(1, 1)
    with pytest.raises(DiscoveryError, match=message):
        _fit_refused(tmp_path, module)


def test_a_plain_network_needs_an_example(tmp_path: Path) -> None:
    with pytest.raises(DiscoveryError, match=r"PlainNetwork has no vocabulary size .* pass example_inputs"):
        _fit_refused(tmp_path, PlainModule(), plain_loader())


@pytest.mark.parametrize(
    ("example_inputs", "message"),
    [
        ({"x": torch.ones(2, 6)}, r"PlainNetwork does not take x alone \(TypeError: .*give example_inputs the names"),
        ({"features": torch.ones(2, 7)}, r"does not take features alone \(RuntimeError: .*the names and shapes"),
    ],
)
def test_examples_that_do_not_fit_are_refused(tmp_path: Path, example_inputs: Any, message: str) -> None:
    callback = GateImportanceCallback(example_inputs=example_inputs)
    with pytest.raises(DiscoveryError, match=message):
        make_trainer(tmp_path, callbacks=[callback]).fit(PlainModule(), plain_loader())


def test_an_example_without_names_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="example_inputs is a Tensor, which does not name the arguments"):
        GateImportanceCallback(example_inputs=torch.ones(2, 6))  # type: ignore[arg-type]


def test_layers_on_a_module_without_forward_are_refused() -> None:
    class NoForward(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.gate = plain_injected_network().gate

        def training_step(self, batch: Any) -> None: ...

        def configure_optimizers(self) -> None: ...

    with pytest.raises(DiscoveryError, match="LoRA layers stand directly on NoForward, which has no forward"):
        find_peft_model(NoForward())


def test_two_networks_without_a_peft_model_are_refused() -> None:
    module = PlainModule(plain_injected_network())
    module.second = plain_injected_network()
    with pytest.raises(ConfigurationError, match=r"PlainModule holds 2 PEFT models \(network, second\)"):
        find_peft_model(module)


def test_a_network_without_lora_is_refused() -> None:
    with pytest.raises(DiscoveryError, match="PlainModule holds no PEFT model; wrap the network"):
        find_peft_model(PlainModule(PlainNetwork()))
