from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from module_helpers import Batches, quiet_trainer, saved_model, some_batches
from torch import Tensor, nn

from na_lora_lightning import GateImportanceCallback, StepScaleCallback
from na_lora_lightning.arguments import AdapterOptions, LoRAOptions, LossOptions, ScheduleOptions
from na_lora_lightning.callbacks.session import NonFiniteGateWarning
from na_lora_lightning.errors import NonFiniteError
from na_lora_lightning.modules.language import NALoRALightningModule
from na_lora_lightning.modules.nonfinite import NonFiniteStepWarning, StepGuard, nonfinite_origin, require_finite


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_model(tmp_path_factory.mktemp("models") / "llama")


def make_module(llama: str, on_nonfinite: str = "stop") -> NALoRALightningModule:
    torch.manual_seed(0)
    return NALoRALightningModule(
        llama,
        lora=LoRAOptions(r=2, alpha=4),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        schedule=ScheduleOptions(name="constant", warmup_fraction=0.0),
        loss=LossOptions(on_nonfinite=on_nonfinite),  # type: ignore[arg-type]
        adapter=AdapterOptions(write="never"),
    )


def mechanisms() -> list[Any]:
    return [GateImportanceCallback(warmup_steps=1, refresh_every=1), StepScaleCallback()]


class Spoil(Callback):
    """Puts a value into the output of a layer, in the forward pass of some batches."""

    def __init__(self, layer: str, batches: set[int], value: float = math.nan) -> None:
        self.layer, self.batches, self.value = layer, batches, value
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        layer = pl_module.peft_model.get_submodule(self.layer)
        self._handle = layer.register_forward_hook(self._spoiled) if batch_idx in self.batches else None

    def _spoiled(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[..., 0] = self.value
        return output

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if self._handle is not None:
            self._handle.remove()
        self.weights.append(trained(pl_module))


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def states(callbacks: list[Any]) -> list[dict[str, Any]]:
    return [callback.state_dict()["mechanism"] for callback in callbacks]


def require_finite_state(callbacks: list[Any]) -> None:
    for state in states(callbacks):
        assert all(value.isfinite().all() for value in state.values() if isinstance(value, Tensor))


def require_equal(first: Any, second: Any) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name], name


UP = "base_model.model.model.layers.1.mlp.up_proj"
GATE = "base_model.model.model.layers.1.mlp.gate_proj"


def test_training_stops_and_names_the_layer(llama: str, tmp_path: Path) -> None:
    callbacks = mechanisms()
    module = make_module(llama)
    spoil = Spoil(UP, {2})
    with pytest.raises(
        NonFiniteError, match=r"training batch 2 in optimizer step 2 is nan, and it begins in '.*1\.mlp\.up"
    ):
        quiet_trainer(tmp_path, callbacks=[*callbacks, spoil]).fit(module, Batches(some_batches(4)))
    # Neither weights nor statistics took anything of it.
    assert len(spoil.weights) == 2
    require_equal([spoil.weights[-1]], [trained(module)])
    require_finite_state(callbacks)
    assert not any(callback.controller.is_attached for callback in callbacks)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_skipped_step_is_as_if_its_batches_were_not_there(llama: str, tmp_path: Path, accumulated: int) -> None:
    batches = some_batches(6 * accumulated)
    bad = {2 * accumulated}
    callbacks, module = mechanisms(), make_module(llama, "skip")
    trainer = quiet_trainer(
        tmp_path, callbacks=[*callbacks, Spoil(UP, bad)], accumulate_grad_batches=accumulated, gradient_clip_val=1.0
    )
    with pytest.warns(NonFiniteStepWarning, match="left out, as the loss of training batch"):
        trainer.fit(module, Batches(batches))
    assert trainer.global_step == 6
    without = [batch for index, batch in enumerate(batches) if index // accumulated != 2]
    other_callbacks, other = mechanisms(), make_module(llama)
    quiet_trainer(tmp_path, callbacks=other_callbacks, accumulate_grad_batches=accumulated, gradient_clip_val=1.0).fit(
        other, Batches(without)
    )
    require_equal([trained(module)], [trained(other)])
    require_equal(states(callbacks), states(other_callbacks))


def test_a_gradient_that_is_not_finite_is_skipped(llama: str, tmp_path: Path) -> None:
    module = make_module(llama, "skip")

    class Overflow(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.global_step == 1:
                next(p for p in pl_module.parameters() if p.requires_grad).grad.fill_(math.inf)

    watch = Spoil(UP, set())
    with pytest.warns(NonFiniteStepWarning, match="gradient of optimizer step 1 is not finite"):
        quiet_trainer(tmp_path, callbacks=[Overflow(), watch]).fit(module, Batches(some_batches(3)))
    require_equal([watch.weights[0]], [watch.weights[1]])
    assert any(not torch.equal(watch.weights[1][name], watch.weights[2][name]) for name in watch.weights[2])


def test_skipping_forever_is_an_error(llama: str, tmp_path: Path) -> None:
    module = make_module(llama, "skip")
    with (
        pytest.warns(NonFiniteStepWarning),
        pytest.raises(NonFiniteError, match="20 optimizer steps in a row were left out"),
    ):
        quiet_trainer(tmp_path, max_epochs=8, callbacks=[Spoil(UP, {0, 1, 2})]).fit(module, Batches(some_batches(3)))


def test_weights_that_are_not_finite_are_not_saved(llama: str, tmp_path: Path) -> None:
    class Break(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            self.steps = getattr(self, "steps", 0) + 1

        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            if trainer.global_step == 1:
                next(p for p in pl_module.parameters() if p.requires_grad).grad.fill_(math.nan)

    saver = ModelCheckpoint(tmp_path / "steps", every_n_train_steps=1, save_top_k=-1)
    trainer = quiet_trainer(tmp_path, enable_checkpointing=True, callbacks=[Break(), saver])
    with pytest.raises(NonFiniteError, match=r"lora_A.* are not finite after optimizer step 2, so they are not saved"):
        trainer.fit(make_module(llama), Batches(some_batches(3)))
    assert [path.name for path in (tmp_path / "steps").iterdir()] == ["epoch=0-step=1.ckpt"]
    with pytest.raises(NonFiniteError, match="'x' are not finite after optimizer step 3"):
        require_finite({"w": torch.ones(1), "x": torch.tensor(math.inf)}, 3)


def test_statistics_leave_out_a_gate_that_is_not_finite_and_name_it(llama: str, tmp_path: Path) -> None:
    callbacks, module = mechanisms(), make_module(llama, "skip")

    class Silence(Callback):
        """Takes the value away behind the activation, so that loss and gradients stay finite."""

        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            act = pl_module.peft_model.get_submodule("base_model.model.model.layers.1.mlp.act_fn")
            act.register_forward_hook(lambda module, args, output: output.nan_to_num(0.0))

    logger = CSVLogger(tmp_path / "logs")
    trainer = quiet_trainer(tmp_path, callbacks=[*callbacks, Silence(), Spoil(GATE, {1})], logger=logger)
    with pytest.warns(NonFiniteGateWarning, match=r"gate '.*layers\.1.*' had NaN or infinite pre-activations until"):
        trainer.fit(module, Batches(some_batches(3)))
    require_finite_state(callbacks)


def test_origin_of_what_is_not_finite() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
    inputs = torch.ones(1, 2)
    assert nonfinite_origin(model, lambda: model(inputs)) == "the activations of every layer are finite"
    handle = model[1][0].register_forward_hook(lambda module, args, output: output / 0.0 * 0.0)
    assert "it begins in '1.0' (ReLU)" in nonfinite_origin(model, lambda: model(inputs))
    handle.remove()
    with torch.no_grad():
        model[1][1].bias[0] = math.inf
    assert "the weights '1.1.bias' are not finite" in nonfinite_origin(model, lambda: model(inputs))
    assert not any(module._forward_hooks for module in model.modules())


def test_step_guard() -> None:
    guard = StepGuard()
    guard.finish()
    for _ in range(2):
        guard.leave_out("of a reason")
    assert guard.skipped_in_a_row == 1
