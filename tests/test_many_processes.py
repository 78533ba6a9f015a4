"""The ready-made module and the command line in two processes."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from module_helpers import Batches, quiet_trainer, saved_model, some_batches, write_records
from processes import run_in_processes
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from na_lora_lightning import GateImportanceCallback, StepScaleCallback
from na_lora_lightning.arguments import AdapterOptions, EvaluationOptions, LoRAOptions, ScheduleOptions
from na_lora_lightning.checkpoints.callbacks import RunCheckpoint
from na_lora_lightning.checkpoints.random_state import OtherProcessesWarning, random_state_of_process
from na_lora_lightning.cli.main import main
from na_lora_lightning.data import InstructionDataModule
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.modules.dual_encoder import DualEncoderLightningModule
from na_lora_lightning.modules.language import NALoRALightningModule

SHARDED = partial(ModelParallelStrategy, 2, 1, save_distributed_checkpoint=False)


def crash_and_resume(base: str, records: str, folder: Path, strategy: Any) -> None:
    """An uninterrupted fit with dropout, and one that is resumed in the middle of its second epoch."""

    def fit(**options: Any) -> dict[str, torch.Tensor]:
        seed_everything(0, verbose=False)
        saver = ModelCheckpoint(folder / "steps", filename="{step}", every_n_train_steps=4, save_top_k=-1)
        trainer = quiet_trainer(
            folder,
            max_epochs=3,
            strategy=strategy() if callable(strategy) else strategy,
            devices=2,
            enable_checkpointing=True,
            callbacks=[saver, GateImportanceCallback(warmup_steps=1, refresh_every=2), StepScaleCallback()],
        )
        module = NALoRALightningModule(
            base,
            lora=LoRAOptions(r=2, alpha=4, dropout=0.3),
            schedule=ScheduleOptions(name="cosine", warmup_steps=2),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
            adapter=AdapterOptions(write="never"),
        )
        # Ranks that draw alike would hide that each has a state of its own.
        torch.manual_seed(trainer.global_rank)
        trainer.fit(module, InstructionDataModule(base, train=records, batch_size=2), **options)
        state = {name: whole(p) for name, p in module.named_parameters() if p.requires_grad}
        return {**state, "random_state": torch.get_rng_state()}

    first = fit()
    second = fit(ckpt_path=folder / "steps" / "step=4.ckpt")
    torch.save([first, second], folder / f"rank_{os.environ['RANK']}.pt")


def whole(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.parametrize("strategy", ["ddp", SHARDED], ids=["ddp", "sharded"])
def test_resumed_dropout_of_two_processes_is_that_of_the_uninterrupted_fit(tmp_path: Path, strategy: Any) -> None:
    records = write_records(tmp_path / "records.jsonl", 12)
    run_in_processes(crash_and_resume, saved_model(tmp_path / "base"), records, tmp_path, strategy)
    finals = []
    for rank in range(2):
        uninterrupted, resumed = torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True)
        assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)
        finals.append(uninterrupted.pop("random_state"))
    states = torch.load(tmp_path / "steps" / "step=4.ckpt", weights_only=True)["na_lora_lightning_random_state"]
    assert states.shape[0] == 2
    assert not torch.equal(states[0], states[1])
    assert not torch.equal(finals[0], finals[1])


class AskOne(Callback):
    """Sends one process the signal of SLURM, within a step."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 1 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)


def ask_for_an_end(base: str, records: str, folder: Path) -> None:
    rank = os.environ["RANK"]
    os.environ |= {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": "0"}
    os.environ |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    os.environ |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "PATH": f"{folder}:{os.environ['PATH']}"}
    trainer = quiet_trainer(
        folder,
        max_steps=3,
        strategy="ddp",
        devices=2,
        enable_checkpointing=True,
        plugins=[SLURMEnvironment()],
        callbacks=[AskOne(), RunCheckpoint(0, dirpath=str(folder / "steps"))],
    )
    module = NALoRALightningModule(base, lora=LoRAOptions(r=2, alpha=4), adapter=AdapterOptions(write="never"))
    trainer.fit(module, InstructionDataModule(base, train=records, batch_size=1))


@pytest.mark.filterwarnings("ignore:The .srun. command is available")
def test_processes_that_slurm_asks_to_end_save_together(tmp_path: Path) -> None:
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "asked"}\n')
    program.chmod(0o755)
    records = write_records(tmp_path / "records.jsonl", 12)
    run_in_processes(ask_for_an_end, saved_model(tmp_path / "base"), records, tmp_path)
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert "epoch=0-step=2.ckpt" in {path.name for path in (tmp_path / "steps").iterdir()}


def test_another_number_of_processes_is_warned_of() -> None:
    states = torch.arange(6, dtype=torch.uint8).view(2, 3)
    chosen = random_state_of_process(states, 1, 2)
    assert chosen is not None
    assert chosen.tolist() == [3, 4, 5]
    with pytest.warns(OtherProcessesWarning, match="written by 2 processes and this run has 4, .* over 4/2 of the rec"):
        assert random_state_of_process(states, 3, 4) is None
    # Checkpoints of one process were a single state once.
    assert random_state_of_process(states[0], 0, 1) is not None


def arguments(base: str, records: str, folder: Path) -> list[str]:
    options = {
        "model.model_name_or_path": base,
        "model.lora.r": 2,
        "model.optimizer": "SGD",
        "model.optimizer.lr": 0.5,
        "model.schedule.name": "constant",
        "model.schedule.warmup_fraction": 0,
        "model.adapter.folder": folder,
        "data.train": records,
        "data.validation": records,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 4,
        "trainer.accumulate_grad_batches": 2,
        "trainer.logger": "false",
        "trainer.enable_checkpointing": "false",
        "trainer.enable_progress_bar": "false",
        "gate_importance.warmup_steps": 1,
        "gate_importance.refresh_every": 1,
        "gate_importance.observer.max_tokens": "null",
        "fit_summary": "false",
    }
    return ["fit", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def run_command(words: list[str]) -> None:
    assert main(words) == 0


SHARDED_OPTIONS = ["ModelParallelStrategy", "--trainer.strategy.data_parallel_size", "2"]
SHARDED_OPTIONS += ["--trainer.strategy.tensor_parallel_size", "1"]
SHARDED_OPTIONS += ["--trainer.strategy.save_distributed_checkpoint", "false"]


NEW_TOKENS = ["--model.new_tokens", "['<think>', '</think>']"]
STREAM = ["--data.streaming", "true", "--data.group_by_length", "false", "--data.shuffle_buffer", "3"]


@pytest.mark.parametrize(
    ("strategy", "more"),
    [(["ddp"], []), (SHARDED_OPTIONS, []), (["ddp"], STREAM), (["ddp"], NEW_TOKENS), (SHARDED_OPTIONS, NEW_TOKENS)],
    ids=["ddp", "sharded", "streamed", "new_tokens", "sharded_new_tokens"],
)
def test_the_command_line_in_two_processes_equals_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: list[str], more: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base, records = saved_model(tmp_path / "base"), write_records(tmp_path / "records.jsonl", 8)
    # Eight records a step in either case, so their order does not matter.
    one = [*arguments(base, records, tmp_path / "one"), "--trainer.devices", "1", "--data.batch_size", "4", *more]
    assert main(one) == 0
    two = [*arguments(base, records, tmp_path / "two"), "--trainer.devices", "2", "--data.batch_size", "2", *more]
    run_in_processes(run_command, [*two, "--trainer.strategy", *strategy])
    alone, together = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert alone.keys() == together.keys()
    assert any(tensor.any() for name, tensor in alone.items() if "lora_B" in name)
    for name, tensor in alone.items():
        assert torch.allclose(tensor, together[name], atol=1e-5), name


def expect_refusals(base: str, folder: Path) -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (partial(ModelParallelStrategy, 1, 2), {}, "set data_parallel_size=2 and tensor_parallel_size=1"),
        (partial(ModelParallelStrategy, 2, 1), {}, "save_distributed_checkpoint=True, and such a checkpoint cannot be"),
        (SHARDED, {"evaluation": EvaluationOptions(generate=True)}, "text cannot be generated where the model is"),
    ]
    for strategy, options, message in cases:
        trainer = quiet_trainer(folder, strategy=strategy(), devices=2)
        with pytest.raises(ConfigurationError, match=message):
            trainer.fit(NALoRALightningModule(base, **options), Batches(some_batches(1)))
    trainer = quiet_trainer(folder, strategy=SHARDED(), devices=2)
    with pytest.raises(ConfigurationError, match="DualEncoderLightningModule does not shard its model; use a single"):
        trainer.fit(DualEncoderLightningModule(base, class_names=["a", "b"]), Batches(some_batches(1)))


def test_what_does_not_work_with_a_sharded_model_is_refused(tmp_path: Path) -> None:
    run_in_processes(expect_refusals, saved_model(tmp_path / "base"), tmp_path)
