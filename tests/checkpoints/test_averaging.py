"""Lightning's averages of weights: of the adapter alone, in checkpoints too, and the same after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.callbacks.spike import SpikeDetection
from module_helpers import Batches, quiet_trainer, saved_model, some_batches
from safetensors.torch import load_file
from tiny_models import LLAMA_TARGETS, random_batch, tiny_llama, with_lora
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from na_lora_lightning.arguments import LoRAOptions, ScheduleOptions
from na_lora_lightning.callbacks.gate_importance import GateImportanceCallback
from na_lora_lightning.callbacks.step_scale import StepScaleCallback
from na_lora_lightning.cli.merge import MergeOptions, merge_adapter
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.modules.language import NALoRALightningModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def make(base: str, **options: Any) -> NALoRALightningModule:
    seed_everything(0, verbose=False)
    return NALoRALightningModule(
        base,
        lora=LoRAOptions(r=2, alpha=4),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-2),
        schedule=ScheduleOptions(name="constant", warmup_fraction=0.0),
        **options,
    )


def fit(folder: Path, base: str, average: Callback | None, epochs: int, others: Any = (), **options: Any) -> Any:
    module = make(base)
    callbacks = [*others, ModelCheckpoint(folder / "checkpoints", save_last=True)]
    callbacks += [average] if average is not None else []
    trainer = quiet_trainer(folder, enable_checkpointing=True, callbacks=callbacks, max_epochs=epochs)
    trainer.fit(module, Batches(some_batches(3), some_batches(1)), **options)
    return module


def adapter(module: NALoRALightningModule) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters() if value.requires_grad}


class Recorder(Callback):
    """Keeps what trained after each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.steps.append(adapter(pl_module))


@pytest.mark.parametrize("use_buffers", [True, False])
def test_the_adapter_written_is_the_average_of_its_steps(tmp_path: Path, use_buffers: bool) -> None:
    base, recorder = saved_model(tmp_path / "base"), Recorder()
    module = fit(tmp_path, base, EMAWeightAveraging(decay=0.5, use_buffers=use_buffers), 2, [recorder])
    expected = recorder.steps[0]
    for step in recorder.steps[1:]:
        expected = {name: 0.5 * value + 0.5 * step[name] for name, value in expected.items()}
    torch.testing.assert_close(adapter(module), expected, rtol=1e-5, atol=1e-7)
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, value in written.items():
        assert torch.equal(value, adapter(module)[f"model.{name}".replace(".weight", ".default.weight")])
    loaded = AutoModelForCausalLM.from_pretrained(base)
    ours = module.peft_model.unload()
    assert all(torch.equal(value, ours.get_parameter(name)) for name, value in loaded.named_parameters())


def test_checkpoints_hold_two_adapters_and_no_base(tmp_path: Path) -> None:
    module = fit(tmp_path, saved_model(tmp_path / "base"), EMAWeightAveraging(decay=0.5), 1)
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    for part in ("state_dict", "current_model_state"):
        assert set(checkpoint[part]) == set(adapter(module))
    name = next(name for name in checkpoint["state_dict"] if "lora_B" in name)
    assert not torch.equal(checkpoint["state_dict"][name], checkpoint["current_model_state"][name])


@pytest.mark.parametrize("average", [EMAWeightAveraging, WeightAveraging])
def test_a_resumed_fit_is_the_uninterrupted_one(tmp_path: Path, average: Any) -> None:
    base = saved_model(tmp_path / "base")

    def mechanisms() -> list[Callback]:
        return [GateImportanceCallback(warmup_steps=1), StepScaleCallback()]

    whole = fit(tmp_path / "whole", base, average(), 4, mechanisms())
    fit(tmp_path / "cut", base, average(), 2, mechanisms())
    path = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    resumed = fit(tmp_path / "cut", base, average(), 4, mechanisms(), ckpt_path=path)
    for name, value in adapter(whole).items():
        assert torch.equal(value, adapter(resumed)[name]), name


def test_rows_that_are_held_stay_in_the_average(tmp_path: Path) -> None:
    recorder = Recorder()
    importance = GateImportanceCallback(keep_fraction=0.5, warmup_steps=1)
    module = fit(tmp_path, saved_model(tmp_path / "base"), EMAWeightAveraging(decay=0.3), 4, [importance, recorder])
    name = next(name for name in recorder.steps[0] if "gate_proj.lora_B" in name)
    values = torch.stack([step[name] for step in recorder.steps])
    unchanged = (values == values[0]).all(dim=0).all(dim=1)
    assert unchanged.any()
    assert not unchanged.all()
    assert torch.equal(adapter(module)[name][unchanged], values[0][unchanged])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_going_on_without_averages_takes_the_weights_that_trained(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base")
    whole = fit(tmp_path / "whole", base, None, 3)
    fit(tmp_path / "cut", base, EMAWeightAveraging(decay=0.5), 2)
    path = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    resumed = fit(tmp_path / "cut", base, None, 3, ckpt_path=path)
    for name, value in adapter(whole).items():
        assert torch.equal(value, adapter(resumed)[name]), name


def test_a_checkpoint_with_averages_merges_and_validates_as_the_average(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base")
    module = fit(tmp_path, base, EMAWeightAveraging(decay=0.5), 1)
    merge_adapter(MergeOptions(tmp_path / "checkpoints" / "last.ckpt", tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ours: Any = module.peft_model.merge_and_unload()
    torch.testing.assert_close(merged.state_dict(), ours.state_dict(), rtol=0, atol=1e-6)


def test_a_16_bit_base_does_not_drift(tmp_path: Path) -> None:
    base = saved_model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(base)
    module = make(base, dtype="bfloat16")
    trainer = quiet_trainer(tmp_path, callbacks=[EMAWeightAveraging()], max_epochs=3)
    trainer.fit(module, Batches(some_batches(3)))
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    ours = module.peft_model.unload()
    assert all(torch.equal(value, ours.get_parameter(name)) for name, value in loaded.named_parameters())


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (
            lambda: StochasticWeightAveraging(swa_lrs=1e-2),
            "StochasticWeightAveraging does not work with LoRA: it copies",
        ),
        (lambda: ModelPruning("l1_unstructured", amount=0.5), "ModelPruning does not work with LoRA: it prunes"),
        (BackboneFinetuning, "BackboneFinetuning does not work with LoRA: it trains the weights of a backbone"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_loaded(tmp_path: Path, callback: Any, message: str) -> None:
    module = make(saved_model(tmp_path / "base"))
    with pytest.raises(ConfigurationError, match=message):
        quiet_trainer(tmp_path, callbacks=[callback()]).fit(module, Batches(some_batches(1)))
    assert module.model is None
    quiet_trainer(tmp_path, callbacks=[ModelCheckpoint()], enable_checkpointing=True).validate(
        module, Batches(some_batches(1), some_batches(1))
    )


def test_spike_detection_works(tmp_path: Path) -> None:
    spikes = SpikeDetection(warmup=1, window=2)
    fit(tmp_path, saved_model(tmp_path / "base"), spikes, 1)
    assert spikes.last_val > 0


class Foreign(LightningModule):
    """A project of somebody else's, with nothing but the two callbacks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = with_lora(tiny_llama(), LLAMA_TARGETS)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.net(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


@pytest.mark.parametrize("average", [EMAWeightAveraging, WeightAveraging])
def test_in_a_foreign_project_a_resumed_fit_is_the_uninterrupted_one(tmp_path: Path, average: Any) -> None:
    def run(folder: str, epochs: int, **options: Any) -> Foreign:
        seed_everything(0, verbose=False)
        module = Foreign()
        saver = ModelCheckpoint(tmp_path / folder, save_last=True)
        callbacks = [average(), GateImportanceCallback(warmup_steps=1), StepScaleCallback(), saver]
        loader = DataLoader([random_batch(seed) for seed in range(3)], batch_size=None)  # type: ignore[arg-type]
        quiet_trainer(tmp_path, enable_checkpointing=True, callbacks=callbacks, max_epochs=epochs).fit(
            module, loader, **options
        )
        return module

    whole = run("whole", 4)
    run("cut", 2)
    resumed = run("cut", 4, ckpt_path=tmp_path / "cut" / "last.ckpt")
    for name, value in adapter(whole).items():  # type: ignore[arg-type]
        assert torch.equal(value, adapter(resumed)[name]), name  # type: ignore[arg-type]
