"""The two callbacks inside Lightning: the invariants of the method, in a project that knows nothing of us."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_models import (
    VISION_KINDS,
    ForeignModule,
    RowWatch,
    assert_equal_states,
    hooks_of,
    loader,
    lora_state,
    make_trainer,
    tiny_peft_model,
)
from tiny_models import tiny_llama
from torch import nn

from na_lora_lightning import GateImportanceCallback, StepScaleCallback
from na_lora_lightning.callbacks.model_search import find_peft_model
from na_lora_lightning.core.observation.observer import ObserverOptions
from na_lora_lightning.errors import ConfigurationError, DiscoveryError, UpdateError

KINDS = pytest.mark.parametrize("kind", ["llama", "gpt2", *VISION_KINDS])


def both(**options: Any) -> list[Callback]:
    importance = {"keep_fraction": 0.5, "warmup_steps": 2, "refresh_every": 2, **options}
    return [GateImportanceCallback(**importance), StepScaleCallback(granularity="channel", normalize=True)]


def fit(
    folder: Path, kind: str, callbacks: list[Callback], module: LightningModule | None = None, **options: Any
) -> ForeignModule:
    module = module or ForeignModule(kind)
    make_trainer(folder, callbacks=callbacks, **options).fit(module, loader(kind=kind))
    return module  # type: ignore[return-value]


@KINDS
def test_all_rows_kept_is_bitwise_vanilla_lora(tmp_path: Path, kind: str) -> None:
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    vanilla = fit(tmp_path, kind, [], **options)
    watched = fit(
        tmp_path,
        kind,
        [
            GateImportanceCallback(keep_fraction=1.0, warmup_steps=0),
            StepScaleCallback(eta_min=1.0, matrix_a_factor=1.0),
        ],
        **options,
    )
    assert vanilla.losses == watched.losses
    assert_equal_states(lora_state(vanilla), lora_state(watched))


@KINDS
def test_masked_rows_do_not_move(tmp_path: Path, kind: str) -> None:
    importance = GateImportanceCallback(keep_fraction=0.25, warmup_steps=1, refresh_every=1)
    watch = RowWatch(importance)
    fit(tmp_path, kind, [importance, watch])
    channels = importance.controller.gates.channels  # type: ignore[union-attr]
    # Eight steps, the first of them warm-up; a quarter of each site's channels is kept.
    assert watch.masked == 7 * channels * 3 // 4


@KINDS
def test_callbacks_work_in_either_order_and_leave_no_hook(tmp_path: Path, kind: str) -> None:
    first = fit(tmp_path, kind, both())
    second = fit(tmp_path, kind, both()[::-1])
    alone = fit(tmp_path, kind, both()[:1])
    assert_equal_states(lora_state(first), lora_state(second))
    assert any(not torch.equal(v, lora_state(alone)[n]) for n, v in lora_state(first).items())
    assert hooks_of(first) == hooks_of(fit(tmp_path, kind, []))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@KINDS
def test_crash_and_resume_equals_an_uninterrupted_run(tmp_path: Path, kind: str) -> None:
    uninterrupted = fit(tmp_path, kind, both(), max_epochs=3)

    def make_saver() -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=tmp_path / "checkpoints", filename="{step}", every_n_epochs=1, save_top_k=-1)

    crashed, saver = ForeignModule(kind, fail_at_step=6), make_saver()
    with pytest.raises(RuntimeError, match="went down"):
        fit(tmp_path, kind, [*both(), saver], crashed, max_epochs=3, enable_checkpointing=True)
    assert hooks_of(crashed) == hooks_of(uninterrupted)

    resumed = ForeignModule(kind)
    trainer = make_trainer(tmp_path, callbacks=[*both(), make_saver()], max_epochs=3, enable_checkpointing=True)
    trainer.fit(resumed, loader(kind=kind), ckpt_path=saver.best_model_path, weights_only=True)
    assert trainer.global_step == 12
    assert resumed.losses == uninterrupted.losses[4:]
    assert_equal_states(lora_state(resumed), lora_state(uninterrupted))


def test_the_checkpointed_state_is_tensors_and_plain_values(tmp_path: Path) -> None:
    callbacks = both()
    module = ForeignModule()
    trainer = make_trainer(tmp_path, callbacks=callbacks)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    saved = checkpoint["callbacks"]["GateImportanceCallback"]
    assert saved["mechanism"]["steps"] == 8
    assert torch.equal(saved["mechanism"]["weights"], callbacks[0].controller.importance.weights)  # type: ignore[attr-defined]
    assert checkpoint["callbacks"]["StepScaleCallback"]["mechanism"]["steps"] == 8


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    callbacks = both()
    make_trainer(tmp_path, callbacks=callbacks).fit(ForeignModule("llama"), loader())
    state = callbacks[0].state_dict()
    other = both()
    other[0].load_state_dict(state)
    with pytest.raises(ConfigurationError, match="holds the importance of 48 gate channels and the model has 128"):
        fit(tmp_path, "gpt2", other)


class Rank(ForeignModule):
    """Takes its shard of each batch by rank, and builds its model where it is trained."""

    def configure_model(self) -> None:
        # transformers' output recorders, which vision models need, do not survive being sent to a process.
        self.network["language"] = tiny_peft_model(self.kind)

    def train_dataloader(self) -> Any:
        world = self.trainer.world_size
        return loader(rank=self.trainer.global_rank if world > 1 else None, world_size=world, kind=self.kind)

    def on_train_end(self) -> None:
        importance = next(c for c in self.trainer.callbacks if isinstance(c, GateImportanceCallback))
        scale = next(c for c in self.trainer.callbacks if isinstance(c, StepScaleCallback))
        found = {
            "lora": lora_state(self),
            "mask": importance.controller.importance.weights,  # type: ignore[union-attr]
            "importance": importance.controller.importance.importance,  # type: ignore[union-attr]
            "scale": scale.controller.step_scale.scale,  # type: ignore[union-attr]
        }
        torch.save(found, Path(self.trainer.default_root_dir) / f"rank_{self.trainer.global_rank}.pt")


@KINDS
def test_two_processes_on_shards_equal_one_on_the_whole_batch(tmp_path: Path, kind: str) -> None:
    observer = ObserverOptions(max_tokens=None)

    def callbacks() -> list[Callback]:
        return [
            GateImportanceCallback(keep_fraction=0.5, warmup_steps=1, refresh_every=1, observer=observer),
            StepScaleCallback(granularity="site", normalize=False, observer=observer),
        ]

    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    make_trainer(tmp_path / "one", callbacks=callbacks()).fit(Rank(kind))
    # A fork need not import everything again, and cannot be made once a graphics card is in use.
    strategy = "ddp_spawn" if kind == "llama" or torch.cuda.is_available() else "ddp_fork"
    trainer = make_trainer(
        tmp_path / "two", callbacks=callbacks(), devices=2, strategy=strategy, use_distributed_sampler=False
    )
    trainer.fit(Rank(kind))
    one = torch.load(tmp_path / "one" / "rank_0.pt", weights_only=True)
    ranks = [torch.load(tmp_path / "two" / f"rank_{rank}.pt", weights_only=True) for rank in range(2)]
    for name in ("mask", "importance", "scale"):
        assert torch.equal(ranks[0][name], ranks[1][name])
    assert torch.equal(ranks[0]["mask"], one["mask"])
    assert torch.allclose(ranks[0]["importance"], one["importance"], atol=1e-6)
    assert torch.allclose(ranks[0]["scale"], one["scale"], atol=1e-6)
    for name, value in one["lora"].items():
        assert torch.equal(ranks[0]["lora"][name], ranks[1]["lora"][name])
        assert torch.allclose(ranks[0]["lora"][name], value, atol=2e-5), name


def test_a_project_without_a_peft_model_is_refused(tmp_path: Path) -> None:
    module = ForeignModule()
    module.network = nn.ModuleDict({"language": tiny_llama()})
    with pytest.raises(DiscoveryError, match="ForeignModule holds no PEFT model"):
        fit(tmp_path, "llama", both(), module)


def test_two_peft_models_are_refused() -> None:
    module = ForeignModule()
    module.network["second"] = ForeignModule("gpt2").model
    with pytest.raises(ConfigurationError, match="ForeignModule holds 2 PEFT models"):
        find_peft_model(module)


def test_injected_lora_without_a_peft_model_is_found(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = tiny_llama()
    model.add_adapter(LoraConfig(r=4, target_modules=["gate_proj", "up_proj"]))
    module = ForeignModule()
    module.network = nn.ModuleDict({"language": model.train()})
    assert find_peft_model(module) is model
    callbacks = both()
    fit(tmp_path, "llama", callbacks, module)
    assert len(callbacks[0].controller.gates) == 2  # type: ignore[attr-defined]


def test_gates_without_lora_stop_before_training(tmp_path: Path) -> None:
    module = ForeignModule(target_modules=["q_proj"])
    with pytest.raises(DiscoveryError, match="none of the model's 2 gates has LoRA"):
        fit(tmp_path, "llama", both(), module)
    assert module.losses == []


def test_an_optimizer_without_the_gates_is_refused_before_training(tmp_path: Path) -> None:
    class Partial(ForeignModule):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for n, p in self.named_parameters() if "q_proj.lora" in n], lr=0.1)

    module = Partial()
    with pytest.raises(UpdateError, match="no optimizer holds"):
        fit(tmp_path, "llama", both(), module)
    assert module.losses == []


def test_different_observers_are_refused(tmp_path: Path) -> None:
    callbacks: list[Callback] = [
        GateImportanceCallback(),
        StepScaleCallback(observer=ObserverOptions(max_tokens=None)),
    ]
    with pytest.raises(ConfigurationError, match="different values of observer"):
        fit(tmp_path, "llama", callbacks)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
        lambda p: torch.optim.Adafactor(p, lr=1e-2),
        lambda p: torch.optim.RMSprop(p, lr=1e-3),
    ],
)
def test_the_mask_holds_under_other_optimizers(tmp_path: Path, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    class Other(ForeignModule):
        def configure_optimizers(self) -> Any:
            return optimizer([p for p in self.parameters() if p.requires_grad])

    importance = GateImportanceCallback(keep_fraction=0.5, warmup_steps=0, refresh_every=2)
    watch = RowWatch(importance)
    fit(tmp_path, "llama", [importance, watch], Other())
    assert watch.masked == 8 * 48 // 2


def test_fit_can_be_called_again(tmp_path: Path) -> None:
    module, callbacks = ForeignModule(), both()
    for _ in range(2):
        make_trainer(tmp_path, callbacks=callbacks).fit(module, loader())
    assert callbacks[0].controller.importance.steps == 8  # type: ignore[attr-defined]
