"""Both mechanisms with nothing but their defaults, in numbers; and the public names, cheap to import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from lightning.pytorch import Callback
from lightning_models import ForeignModule, loader, lora_state, make_trainer
from peft import PeftModel
from tiny_models import random_batch
from torch import Tensor, nn

import na_lora_lightning
from na_lora_lightning import GateImportanceCallback, StepScaleCallback, nonlinearity_aware
from na_lora_lightning.core.controller import GateController
from na_lora_lightning.core.mechanisms.importance_options import ImportanceOptions
from na_lora_lightning.core.mechanisms.step_scale_options import StepScaleOptions

# Of the mask; and enough steps for the first two masks.
WARMUP_STEPS, STEPS = 10, 12


def scales_of_sites(controller: GateController) -> list[Tensor]:
    """Scales of the channels of each site: one number for the activation that all of them have, below 1."""
    assert controller.step_scale is not None
    scale = controller.step_scale.scale
    assert bool((scale == scale[0]).all())
    assert 0.1 < float(scale[0]) < 1.0
    return [scale[:1].expand(site.channels) for site in controller.gates]


def check_first_step(
    model: nn.Module, controller: GateController, before: dict[str, Tensor], twin: dict[str, Tensor]
) -> None:
    """Against the weights of a twin whose optimizer stepped alone."""
    own, names = lora_state(model), {id(parameter): name for name, parameter in model.named_parameters()}
    sites, scales = controller.gates.sites, scales_of_sites(controller)
    # The warm-up keeps all rows, so that the scale alone acts on them.
    scale_of = {
        names[id(entry.parameter)]: scale
        for site, scale in zip(sites, scales, strict=True)
        for entry in site.parameters()
    }
    assert len(scale_of) == 2
    assert own.keys() == before.keys() == twin.keys()
    for name, plain in twin.items():
        assert not torch.equal(plain, before[name]), name
        if name in scale_of:
            rows = reference.update_rows(before[name].tolist(), plain.tolist(), scale_of[name].tolist())
            assert torch.allclose(own[name], torch.tensor(rows), atol=1e-7), name
            assert not torch.equal(own[name], plain), name
        else:
            assert torch.equal(own[name], plain), name


def check_weights(controller: GateController, step: int) -> None:
    """No mask during the warm-up; then one of all channels of each site but the least responsive tenth."""
    assert controller.importance is not None
    sizes = [site.channels for site in controller.gates]
    masks, averages, weights = (
        part.split(sizes)
        for part in (controller.importance.weights, controller.importance.importance, controller.weights)
    )
    for index, scale in enumerate(scales_of_sites(controller)):
        mask = masks[index]
        assert torch.equal(weights[index], mask * scale)
        if step <= WARMUP_STEPS:
            assert bool((mask == 1.0).all())
            continue
        # To the nearest channel.
        assert float(mask.mean()) == pytest.approx(0.9, abs=0.5 / len(mask))
        if step == WARMUP_STEPS + 1:
            assert mask.tolist() == reference.top_k(averages[index].tolist(), 0.9)


def check_statistics(controller: GateController, seen: list[list[list[float]]]) -> None:
    """Responsiveness and scales of the first step, recomputed from the pre-activations of real tokens."""
    assert controller.importance is not None
    sizes = [site.channels for site in controller.gates]
    found = controller.importance.responsiveness.split(sizes)
    for site, tokens, responsiveness in zip(controller.gates, seen, found, strict=True):
        expected = reference.responsiveness("output_derivative", site.activation.name, tokens)
        assert responsiveness.tolist() == pytest.approx(expected, rel=1e-5)
    (name,) = {site.activation.name for site in controller.gates}
    shares = reference.regime_shares(name, [value for tokens in seen for token in tokens for value in token], 0.1)
    for scale in scales_of_sites(controller):
        assert scale.tolist() == pytest.approx([reference.step_scale(*shares, 0.1)] * len(scale), rel=1e-5)


def test_the_callbacks_take_the_defaults_of_the_options() -> None:
    mask = ImportanceOptions(keep_fraction=0.9, criterion="output_derivative", warmup_steps=WARMUP_STEPS)
    assert GateImportanceCallback().options == ImportanceOptions() == mask
    scale = StepScaleOptions(granularity="activation", normalize=False, matrix_a_factor=1.0)
    assert StepScaleCallback().options == StepScaleOptions() == scale


class AfterEachStep(Callback):
    """Checks something."""

    def __init__(self, check: Callable[[int], None]) -> None:
        self.check = check

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.check(trainer.global_step)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_callbacks_in_lightning(tmp_path: Path, kind: str) -> None:
    plain, module = ForeignModule(kind), ForeignModule(kind)
    make_trainer(tmp_path, max_steps=1).fit(plain, loader(kind=kind))
    before, importance = lora_state(module), GateImportanceCallback()

    def check(step: int) -> None:
        assert importance.controller is not None
        if step == 1:
            check_first_step(module, importance.controller, before, lora_state(plain))
        check_weights(importance.controller, step)

    callbacks = [importance, StepScaleCallback(), AfterEachStep(check)]
    make_trainer(tmp_path, callbacks=callbacks, max_epochs=3).fit(module, loader(kind=kind))
    assert importance.controller is not None
    assert importance.controller.steps == STEPS


def test_a_plain_loop(make_peft_model: Callable[..., PeftModel]) -> None:
    model, twin = make_peft_model(), make_peft_model()
    before = lora_state(model)
    optimizer, plain = (
        torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        for each in (model, twin)
    )
    twin(**random_batch(0)).loss.backward()
    plain.step()
    with nonlinearity_aware(model, optimizer) as controller:
        sites = controller.gates.sites
        seen: list[list[Tensor]] = [[] for _ in sites]
        for site, kept in zip(sites, seen, strict=True):
            site.source.module.register_forward_pre_hook(lambda m, args, to=kept: to.append(args[0].detach()))
        for step in range(1, STEPS + 1):
            batch = random_batch(step - 1)
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                check_first_step(model, controller, before, lora_state(twin))
                check_statistics(controller, [kept[0][batch["attention_mask"].bool()].tolist() for kept in seen])
            check_weights(controller, step)
    assert controller.steps == STEPS
    assert controller.importance is not None
    assert float(controller.importance.weights.mean()) == pytest.approx(0.9, abs=0.5 / sites[0].channels)


def test_every_public_name_is_there() -> None:
    for name in na_lora_lightning.__all__:
        assert getattr(na_lora_lightning, name) is not None
    assert set(na_lora_lightning.__all__) <= set(dir(na_lora_lightning))
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        na_lora_lightning.Nonsense  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, na_lora_lightning, na_lora_lightning.cli.main; print([m for m in sys.modules if '.' not in m])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "transformers", "lightning", "peft"):
        assert f"'{heavy}'" not in loaded


def test_the_core_does_not_import_lightning_or_peft() -> None:
    code = "import sys, na_lora_lightning.core.controller; print([m for m in sys.modules if '.' not in m])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for foreign in ("lightning", "pytorch_lightning", "peft", "transformers"):
        assert f"'{foreign}'" not in loaded
