"""Every strategy is right, which is shown by two processes against one, or refused by name."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
from lightning_models import ForeignModule, assert_equal_states, loader, make_trainer, tiny_peft_model
from processes import run_in_processes
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from na_lora_lightning import GateImportanceCallback, StepScaleCallback
from na_lora_lightning.callbacks.supported import require_supported_strategy
from na_lora_lightning.core.mechanisms.importance_options import ImportanceVariant
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.errors import ConfigurationError, UpdateError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    # torch 2.13 imports deprecated functions of its own for post-local SGD.
    pytest.mark.filterwarnings("ignore:.torch.jit.[a-z]+. is deprecated:DeprecationWarning"),
]

STRATEGIES: dict[str, Any] = {
    "ddp": "ddp",
    "ddp_find_unused_parameters_true": "ddp_find_unused_parameters_true",
    "static_graph": partial(DDPStrategy, static_graph=True),
    "bucket_view": partial(DDPStrategy, gradient_as_bucket_view=True),
    "fsdp2": partial(ModelParallelStrategy, 2, 1, save_distributed_checkpoint=False),
    "fsdp2_sharded_checkpoint": partial(ModelParallelStrategy, 2, 1),
}


class Shard(ForeignModule):
    """Takes its share of each batch by rank, and shards its model where the strategy has a mesh for it."""

    def configure_model(self) -> None:
        self.network["language"] = tiny_peft_model(self.kind)
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(self.model, self.device_mesh["data_parallel"])

    def train_dataloader(self) -> Any:
        world = self.trainer.world_size
        return loader(rank=self.trainer.global_rank if world > 1 else None, world_size=world, kind=self.kind)

    def val_dataloader(self) -> Any:
        return loader(1, kind=self.kind)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.model(**batch)


def shard(model: Any, mesh: Any) -> None:
    base = model.get_base_model()
    for layer in base.model.layers if hasattr(base, "model") else base.transformer.h:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def mechanisms(**options: Any) -> list[Callback]:
    observer = ObserverOptions(max_tokens=None)
    settings = {"keep_fraction": 0.5, "warmup_steps": 1, "refresh_every": 1, "observer": observer, **options}
    return [
        GateImportanceCallback(**settings),
        StepScaleCallback(granularity="channel", normalize=True, observer=observer),
    ]


def whole(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter).detach().clone()


def fit(
    folder: Path,
    kind: str,
    strategy: Any,
    trainer: dict[str, Any],
    options: dict[str, Any],
    kind_of_module: type[Shard] = Shard,
    **fit: Any,
) -> None:
    """Fits, and writes what came out in this process."""
    callbacks = mechanisms(**options)
    module = kind_of_module(kind)
    found = make_trainer(
        folder,
        callbacks=[*callbacks, *trainer.pop("callbacks", [])],
        strategy=strategy() if callable(strategy) else strategy,
        use_distributed_sampler=False,
        **trainer,
    )
    found.fit(module, **fit)
    torch.save(
        {
            "lora": {name: whole(p) for name, p in module.named_parameters() if p.requires_grad},
            "mask": callbacks[0].controller.importance.weights,  # type: ignore[attr-defined]
            "states": [callback.state_dict() for callback in callbacks],
            "losses": module.losses,
        },
        folder / f"rank_{found.global_rank}.pt",
    )


def compare(folder: Path, processes: Path) -> None:
    """Masks and states are the same on every rank, masks those of one process, and weights nearly so."""
    one = torch.load(folder / "rank_0.pt", weights_only=True)
    ranks = [torch.load(processes / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]
    assert 0 < int((one["mask"] == 0).sum()) < one["mask"].numel()
    assert torch.equal(ranks[0]["mask"], one["mask"])
    for first, second, single in zip(ranks[0]["states"], ranks[1]["states"], one["states"], strict=True):
        assert first["forward_passes"] == second["forward_passes"] == single["forward_passes"]
        for name, value in first["mechanism"].items():
            if isinstance(value, Tensor):
                assert torch.equal(value, second["mechanism"][name]), name
                assert torch.allclose(value.float(), single["mechanism"][name].float(), atol=1e-5), name
            else:
                assert value == second["mechanism"][name] == single["mechanism"][name]
    assert_equal_states(ranks[0]["lora"], ranks[1]["lora"])
    for name, value in one["lora"].items():
        assert torch.allclose(ranks[0]["lora"][name], value, atol=2e-5), name


ACCUMULATING = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}


@pytest.mark.parametrize(
    ("strategy", "kind", "trainer", "options"),
    [
        ("ddp", "llama", ACCUMULATING, {}),
        ("ddp", "gpt2", {}, {"variant": ImportanceVariant(mask_gradient_to_a=True)}),
        ("ddp_find_unused_parameters_true", "llama", {}, {"scope": "global"}),
        ("static_graph", "llama", {}, {}),
        ("bucket_view", "gpt2", ACCUMULATING, {}),
        ("fsdp2", "llama", {}, {"scope": "global"}),
        ("fsdp2", "gpt2", ACCUMULATING, {}),
    ],
)
def test_two_processes_equal_one(
    tmp_path: Path, strategy: str, kind: str, trainer: dict[str, Any], options: dict[str, Any]
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    fit(tmp_path / "one", kind, "auto", dict(trainer), options)
    run_in_processes(fit, tmp_path / "two", kind, STRATEGIES[strategy], {**trainer, "devices": 2}, options)
    compare(tmp_path / "one", tmp_path / "two")


def fit_with_one_logger(folder: Path) -> None:
    first = os.environ["RANK"] == "0"
    logger = CSVLogger(folder) if first else False
    strategy = partial(DDPStrategy, timeout=timedelta(seconds=60))
    fit(folder, "llama", strategy, {"devices": 2, "logger": logger}, {})


def test_a_logger_in_one_process_alone_does_not_part_them(tmp_path: Path) -> None:
    run_in_processes(fit_with_one_logger, tmp_path)
    ranks = [torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]
    assert_equal_states(ranks[0]["lora"], ranks[1]["lora"])
    (written,) = tmp_path.glob("lightning_logs/*/metrics.csv")
    assert "gates/selection_misalignment" in written.read_text()


class SharesOptimizer(Shard):
    """Each process keeps the optimizer's state of some parameters and sends those to the others."""

    def configure_optimizers(self) -> Any:
        if self.trainer.world_size == 1:
            return super().configure_optimizers()
        from torch.distributed.optim import ZeroRedundancyOptimizer

        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_an_optimizer_that_processes_share_is_masked_on_all(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    fit(tmp_path / "one", "llama", "auto", {}, {}, kind_of_module=SharesOptimizer)
    run_in_processes(fit_sharing, tmp_path / "two")
    compare(tmp_path / "one", tmp_path / "two")


def fit_sharing(folder: Path) -> None:
    fit(folder, "llama", "ddp", {"devices": 2}, {}, kind_of_module=SharesOptimizer)


@pytest.mark.skipif(torch.cuda.is_available(), reason="processes cannot be forked once a graphics card is in use")
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook"])
def test_forks_of_a_notebook_equal_one_process(tmp_path: Path, strategy: str) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    fit(tmp_path / "one", "llama", "auto", {}, {})

    class Saving(Shard):
        def on_train_end(self) -> None:
            importance, scale = (c for c in self.trainer.callbacks if hasattr(c, "controller"))  # type: ignore[attr-defined]
            found = {
                "lora": {name: whole(p) for name, p in self.named_parameters() if p.requires_grad},
                "mask": importance.controller.importance.weights,
                "states": [importance.state_dict(), scale.state_dict()],
            }
            torch.save(found, tmp_path / "two" / f"rank_{self.trainer.global_rank}.pt")

    options: dict[str, Any] = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False}
    make_trainer(tmp_path / "two", callbacks=mechanisms(), **options).fit(Saving())
    compare(tmp_path / "one", tmp_path / "two")


class CrashAt(Callback):
    """Ends a fit in the middle of an epoch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("the machine went down")


def crash_and_resume(folder: Path, strategy: str) -> None:
    """An uninterrupted fit, and one that is resumed from the checkpoint of its first epoch."""
    options = {"devices": 2, "max_epochs": 3}
    for name in ("whole", "crashed", "resumed"):
        (folder / name).mkdir(exist_ok=True)

    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(folder / "checkpoints", filename="{step}", every_n_epochs=1, save_top_k=-1)

    fit(folder / "whole", "llama", STRATEGIES[strategy], dict(options), {})
    crashing = {**options, "callbacks": [saver(), CrashAt(6)], "enable_checkpointing": True}
    with pytest.raises(RuntimeError, match="went down"):
        fit(folder / "crashed", "llama", STRATEGIES[strategy], crashing, {})
    checkpoint = folder / "checkpoints" / "step=4.ckpt"
    resuming = {**options, "callbacks": [saver()], "enable_checkpointing": True}
    fit(folder / "resumed", "llama", STRATEGIES[strategy], resuming, {}, ckpt_path=checkpoint)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "fsdp2_sharded_checkpoint"])
def test_resumed_in_two_processes_equals_uninterrupted(tmp_path: Path, strategy: str) -> None:
    run_in_processes(crash_and_resume, tmp_path, strategy)
    for rank in range(2):
        uninterrupted = torch.load(tmp_path / "whole" / f"rank_{rank}.pt", weights_only=True)
        resumed = torch.load(tmp_path / "resumed" / f"rank_{rank}.pt", weights_only=True)
        assert len(resumed["losses"]) == 8
        assert resumed["losses"] == uninterrupted["losses"][4:]
        assert torch.equal(resumed["mask"], uninterrupted["mask"])
        assert_equal_states(resumed["lora"], uninterrupted["lora"])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (FSDPStrategy, "flattens parameters into one"),
        (DeepSpeedStrategy, "steps float32 copies in an engine of its own"),
        (XLAStrategy, "on XLA devices"),
        (SingleDeviceXLAStrategy, "on XLA devices"),
        (type("Custom", (), {}), "is not known"),
    ],
)
def test_other_strategies_are_refused_by_name(kind: type, reason: str) -> None:
    class Fit:
        strategy = object.__new__(kind)

    with pytest.raises(UpdateError, match=f"the strategy {kind.__name__} .*{reason}.*; use strategy='ddp', or Model"):
        require_supported_strategy(Fit())  # type: ignore[arg-type]


@pytest.mark.parametrize("base", [SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy])
def test_strategies_derived_from_those_that_work_are_taken(base: type) -> None:
    class Fit:
        strategy = object.__new__(type("OfSomebody", (base,), {}))

    require_supported_strategy(Fit())  # type: ignore[arg-type]


def test_refusal_comes_before_the_model_is_made(tmp_path: Path) -> None:
    class NotMade(ForeignModule):
        def configure_model(self) -> None:
            raise AssertionError("the model is made")

    # Any of this name; the real one would not start here.
    strategy = type("DeepSpeedStrategy", (SingleDeviceStrategy,), {})(device="cpu")
    with pytest.raises(UpdateError, match="the strategy DeepSpeedStrategy steps float32 copies"):
        make_trainer(tmp_path, callbacks=mechanisms(), strategy=strategy).fit(NotMade(), loader())


class Unsharded(Shard):
    def configure_model(self) -> None:
        self.network["language"] = tiny_peft_model(self.kind)


class ShardedOutside(Shard):
    def configure_model(self) -> None:
        self.network["language"] = tiny_peft_model(self.kind)
        fully_shard(self, mesh=self.device_mesh["data_parallel"])


class PartlySharded(Shard):
    def configure_model(self) -> None:
        self.network["language"] = tiny_peft_model(self.kind)
        lora = {parameter for parameter in self.model.parameters() if parameter.requires_grad}
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"], ignored_params=lora)


def expect_refusals(folder: Path) -> None:
    cases: list[tuple[type[ForeignModule], Any, Any, str]] = [
        (Unsharded, partial(ModelParallelStrategy, 2, 1), {}, "Unsharded has not called on its PEFT model"),
        (ShardedOutside, partial(ModelParallelStrategy, 2, 1), {}, "was called on FSDPShardedOutside, around the PEFT"),
        (PartlySharded, partial(ModelParallelStrategy, 2, 1), {}, "is not sharded though the model around it is"),
        (Unsharded, partial(ModelParallelStrategy, 1, 2), {}, "set data_parallel_size=2 and tensor_parallel_size=1"),
        (Unsharded, post_local_sgd, {}, "averages weights over processes from time to time"),
        (
            Shard,
            partial(ModelParallelStrategy, 2, 1),
            {"variant": ImportanceVariant(mask_gradient_to_a=True)},
            "mask_gradient_to_a does not work for .*, which is sharded",
        ),
    ]
    for module, strategy, options, message in cases:
        trainer = make_trainer(folder, callbacks=mechanisms(**options), devices=2, strategy=strategy())
        with pytest.raises((UpdateError, ConfigurationError), match=message):
            trainer.fit(module())


def post_local_sgd() -> DDPStrategy:
    from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState

    return DDPStrategy(ddp_comm_state=PostLocalSGDState(None, None, 2), model_averaging_period=2)


def test_what_does_not_make_one_model_is_refused(tmp_path: Path) -> None:
    run_in_processes(expect_refusals, tmp_path)
