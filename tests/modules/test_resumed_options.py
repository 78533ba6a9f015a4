"""Resuming with other options than the checkpoint's: they apply and are named, or are refused by name."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from module_helpers import quiet_trainer, saved_model, write_records

from na_lora_lightning import GateImportanceCallback, StepScaleCallback
from na_lora_lightning.arguments import AdapterOptions, LoRAOptions, LossOptions, ScheduleOptions
from na_lora_lightning.checkpoints.callbacks import RunCheckpoint
from na_lora_lightning.data import InstructionDataModule
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.modules import optimization
from na_lora_lightning.modules.language import NALoRALightningModule
from na_lora_lightning.modules.resumed_options import OPTIONS_KEY, ResumedOptions

ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
CONSTANT = ScheduleOptions(name="constant", warmup_fraction=0.0)

# The resumed fit goes on in the folder of the first, or of a copy of it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]


class Rates(Callback):
    """What the optimizer's first group says when each batch begins."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: Any, *others: Any) -> None:
        self.seen.append({**trainer.optimizers[0].param_groups[0], "params": None})


class Run:
    """Fits of three steps an epoch, saved after each step, and what they say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.records = str(folder / "base"), str(folder / "records.jsonl")
        self.said: list[str] = []

    def fit(self, checkpoint: str | None = None, **options: Any) -> Rates:
        seed_everything(options.pop("seed", 0), verbose=False)
        module_names = ("optimizer", "schedule", "lora", "loss")
        given = {name: options.pop(name) for name in module_names if name in options}
        settings = {"optimizer": ADAMW, "schedule": CONSTANT, "lora": LoRAOptions(r=2, alpha=4), **given}
        self.module = NALoRALightningModule(self.base, adapter=AdapterOptions(write="never"), **settings)
        self.module.draws_seed = options.pop("draws_seed", False)
        rates = Rates()
        saver = options.pop("saver", None) or RunCheckpoint(1, keep=20, dirpath=str(self.folder / "steps"))
        callbacks = [saver, rates, *options.pop("callbacks", [])]
        trainer_options = {"max_epochs": 2, "enable_checkpointing": True, **options}
        self.trainer = quiet_trainer(self.folder, callbacks=callbacks, **trainer_options)
        path = None if checkpoint is None else self.folder / "steps" / checkpoint
        self.said.clear()
        self.trainer.fit(
            self.module, InstructionDataModule(self.base, train=self.records, batch_size=4), ckpt_path=path
        )
        return rates

    def checkpoint(self, name: str) -> dict[str, Any]:
        return torch.load(self.folder / "steps" / name, weights_only=True)  # type: ignore[no-any-return]

    @property
    def lines(self) -> list[str]:
        return [line for line in self.said if "other options" in line]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a fit with the options that are not given below."""
    folder = tmp_path_factory.mktemp("plain")
    saved_model(folder / "base")
    write_records(folder / "records.jsonl", 12)
    Run(folder).fit()
    return folder


@pytest.fixture
def run(plain: Path, tmp_path: Path) -> Iterator[Run]:
    """A run that has that fit behind it, unless it begins with another."""
    shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
    found = Run(tmp_path)
    found.base = str(plain / "base")

    class Listener(logging.Handler):
        def emit(self, message: logging.LogRecord) -> None:
            found.said.append(message.getMessage())

    logger, listener = logging.getLogger("na_lora_lightning"), Listener()
    logger.addHandler(listener)
    yield found
    logger.removeHandler(listener)


def line(changes: str) -> list[str]:
    return [f"Training resumes with other options than the checkpoint's: {changes}."]


MIDDLE, LAST = "epoch=1-step=4.ckpt", "epoch=1-step=6.ckpt"


def test_unchanged_options_are_left_as_they_were_without_a_word(run: Run) -> None:
    cosine = ScheduleOptions(name="cosine", warmup_steps=2)
    run.fit(schedule=cosine)
    whole, state = run.checkpoint(LAST), run.module.state_dict()
    run.fit(MIDDLE, schedule=cosine)
    assert run.lines == []
    again = run.checkpoint(LAST)
    assert again["optimizer_states"][0]["param_groups"] == whole["optimizer_states"][0]["param_groups"]
    assert again["lr_schedulers"] == whole["lr_schedulers"]
    assert again[OPTIONS_KEY] == whole[OPTIONS_KEY]
    assert all(torch.equal(value, run.module.state_dict()[name]) for name, value in state.items())


def test_options_of_the_optimizer_apply_and_are_recorded(run: Run) -> None:
    changed = partial(torch.optim.AdamW, lr=1e-5, weight_decay=0.5, betas=(0.8, 0.9), eps=1e-6)
    rates = run.fit(MIDDLE, optimizer=changed, max_epochs=3)
    assert run.lines == line(
        "trainer.max_epochs 2 → 3, optimizer.lr 0.01 → 1e-05, optimizer.betas [0.9, 0.999] → [0.8, 0.9], "
        "optimizer.eps 1e-08 → 1e-06, optimizer.weight_decay 0 → 0.5"
    )
    assert [(group["lr"], group["weight_decay"]) for group in rates.seen] == [(1e-5, 0.5)] * 5
    assert {(group["betas"], group["eps"]) for group in rates.seen} == {((0.8, 0.9), 1e-6)}
    saved = run.checkpoint("epoch=2-step=9.ckpt")
    assert saved["lr_schedulers"][0]["base_lrs"] == [1e-5]
    assert saved[OPTIONS_KEY]["optimizers"][0]["groups"][0]["lr"] == 1e-5
    # Going on from there with what is true now has nothing to say.
    run.fit("epoch=2-step=8.ckpt", optimizer=changed, max_epochs=3)
    assert run.lines == []


@pytest.mark.parametrize("before", [False, True])
def test_a_fit_stays_fused_or_not_unless_something_is_said(run: Run, before: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if not before:
            patch.setattr(optimization, "_is_fusible", lambda *arguments: False)
        run.fit()
    whole, state = run.checkpoint(LAST), run.module.state_dict()
    rates = run.fit(MIDDLE)
    assert (run.lines, {bool(group["fused"]) for group in rates.seen}) == ([], {before})
    assert run.checkpoint(LAST)["optimizer_states"][0]["param_groups"] == whole["optimizer_states"][0]["param_groups"]
    assert all(torch.equal(value, run.module.state_dict()[name]) for name, value in state.items())
    rates = run.fit(MIDDLE, optimizer=partial(ADAMW, fused=not before))
    assert run.lines == line(f"optimizer.fused {'True → False' if before else 'None → True'}")
    assert {group["fused"] for group in rates.seen} == {not before}


@pytest.mark.parametrize(
    ("options", "changes", "rates"),
    [
        # 1e-2 times what the new schedule has after 4 and 5 of its steps.
        (
            {"schedule": ScheduleOptions(name="linear", warmup_steps=0)},
            "schedule.name constant → linear",
            [2 / 6, 1 / 6],
        ),
        ({"max_steps": 5}, "trainer.max_steps -1 → 5", [1.0]),
        (
            {"schedule": ScheduleOptions(name="constant_with_warmup", warmup_steps=5)},
            "schedule.name constant → constant_with_warmup",
            [4 / 5, 1.0],
        ),
    ],
)
def test_another_schedule_is_that_of_the_step(
    run: Run, options: dict[str, Any], changes: str, rates: list[float]
) -> None:
    seen = run.fit(MIDDLE, **options).seen
    assert run.lines[0].startswith(line(changes)[0].rstrip("."))
    assert [group["lr"] for group in seen] == pytest.approx([1e-2 * rate for rate in rates])


def test_more_epochs_stretch_the_schedule_from_the_first_step_on(run: Run) -> None:
    linear = ScheduleOptions(name="linear", warmup_steps=0)
    run.fit(schedule=linear)
    seen = run.fit(MIDDLE, schedule=linear, max_epochs=4).seen
    assert [group["lr"] for group in seen] == pytest.approx([1e-2 * (12 - step) / 12 for step in range(4, 12)])
    assert run.lines == line("trainer.max_epochs 2 → 4")


def test_another_accumulation_counts_the_steps_that_are_left(run: Run) -> None:
    linear = ScheduleOptions(name="linear", warmup_steps=0)
    run.fit(schedule=linear)
    seen = run.fit("epoch=0-step=3.ckpt", schedule=linear, accumulate_grad_batches=2, max_epochs=3).seen
    # Three steps are behind, and two epochs of two steps follow.
    assert [group["lr"] for group in seen] == pytest.approx([1e-2 * left / 7 for left in (4, 4, 3, 2, 2, 1)])
    assert run.lines == line("trainer.accumulate_grad_batches 1 → 2, trainer.max_epochs 2 → 3")


def test_an_accumulation_that_would_cut_a_step_is_refused(run: Run) -> None:
    with pytest.raises(ConfigurationError, match=r"after 1 batches of an epoch.*set it to 1 as before"):
        run.fit(MIDDLE, accumulate_grad_batches=2)


def test_one_batch_is_not_all_of_them(run: Run) -> None:
    run.fit("epoch=0-step=3.ckpt", limit_train_batches=1)
    assert run.lines == line("trainer.limit_train_batches 100 % → 1")
    assert run.trainer.global_step == 4


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"gradient_clip_val": 0.1}, "trainer.gradient_clip_val None → 0.1"),
        ({"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, None),
        ({"precision": "bf16-mixed"}, "trainer.precision 32-true → bf16-mixed"),
        ({"loss": LossOptions(average_over="micro_batch")}, "loss.average_over step → micro_batch"),
        ({"lora": LoRAOptions(r=2, alpha=4, dropout=0.3)}, "lora.dropout 0 → 0.3"),
        ({"lora": LoRAOptions(r=2, alpha=4, layers="peft")}, "lora.layers fast → peft"),
        ({"seed": 7}, "seed_everything 0 → 7"),
    ],
)
def test_what_applies_by_itself_is_said(run: Run, options: dict[str, Any], changes: str | None) -> None:
    run.fit("epoch=1-step=5.ckpt", **options)
    expected = changes or "trainer.gradient_clip_val None → 0.1, trainer.gradient_clip_algorithm None → value"
    assert run.lines == line(expected)


def test_a_seed_that_is_drawn_anew_is_no_other_option(run: Run) -> None:
    dropout = LoRAOptions(r=2, alpha=4, dropout=0.5)
    run.fit(lora=dropout, draws_seed=True)
    whole = run.module.state_dict()
    run.fit(MIDDLE, lora=dropout, seed=7, draws_seed=True)
    assert run.lines == []
    assert all(torch.equal(value, run.module.state_dict()[name]) for name, value in whole.items())


def test_another_seed_draws_other_dropout(run: Run) -> None:
    found = []
    dropout = LoRAOptions(r=2, alpha=4, dropout=0.5)
    run.fit(lora=dropout)
    for seed in (0, 0, 7):
        run.fit(MIDDLE, lora=dropout, seed=seed)
        found.append(torch.cat([value.flatten() for value in run.module.state_dict().values()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            partial(torch.optim.SGD, lr=0.1),
            r"trained with the optimizer torch.optim.AdamW and this run has torch.optim.SGD",
        ),
        (partial(torch.optim.Adam, lr=0.1), r"torch.optim.AdamW and this run has torch.optim.Adam, which cannot"),
        (partial(torch.optim.AdamW, lr=0.1, amsgrad=True), r"the option amsgrad of the .* no 'max_exp_avg_sq'"),
        (
            lambda parameters: torch.optim.AdamW([{"params": [entry]} for entry in parameters]),
            r"in groups of 28 and this run's in groups of 1 and 1",
        ),
    ],
)
def test_an_optimizer_that_cannot_go_on_is_refused(run: Run, optimizer: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        run.fit(MIDDLE, optimizer=optimizer)


def test_checkpoints_of_earlier_versions_load_and_their_groups_are_compared(run: Run) -> None:
    old = run.checkpoint(MIDDLE)
    del old[OPTIONS_KEY]
    # What a resume that was outvoted had written.
    old["hyper_parameters"]["optimizer"]["init_args"]["lr"] = 1e-5
    torch.save(old, run.folder / "steps" / "old.ckpt")
    run.fit("old.ckpt")
    assert run.lines == []
    seen = run.fit("old.ckpt", optimizer=partial(torch.optim.AdamW, lr=1e-5, weight_decay=0.0)).seen
    assert run.lines == line("optimizer.lr 0.01 → 1e-05")
    assert [group["lr"] for group in seen] == [1e-5, 1e-5]
    with pytest.raises(ConfigurationError, match=r"torch.optim.AdamW and this run has torch.optim.SGD"):
        run.fit("old.ckpt", optimizer=partial(torch.optim.SGD, lr=0.1))


# ---- callbacks ----


def test_patience_of_now_applies(run: Run) -> None:
    run.fit(callbacks=[EarlyStopping("train/loss", patience=9)])
    stopping = EarlyStopping("train/loss", patience=2, min_delta=0.5)
    run.fit("epoch=1-step=5.ckpt", callbacks=[stopping])
    assert (stopping.patience, stopping.min_delta) == (2, -0.5)
    assert run.lines == line("EarlyStopping.min_delta 0.0 → 0.5, EarlyStopping.patience 9 → 2")


def test_a_checkpoint_callback_that_saves_more_often_knows_its_files(run: Run) -> None:
    def saver(every: int, keep: int) -> ModelCheckpoint:
        return ModelCheckpoint(
            run.folder / "best", "{step}", "train/loss", save_top_k=keep, every_n_train_steps=every, mode="min"
        )

    first = saver(1, 6)
    run.fit(saver=first)
    best = sorted(first.best_k_models, key=lambda path: float(first.best_k_models[path]))
    second = saver(2, 3)
    run.fit("../best/step=6.ckpt", saver=second)
    assert sorted(second.best_k_models) == sorted(best[:3])
    assert second.kth_best_model_path == best[2]
    assert run.lines == line("ModelCheckpoint.save_top_k 6 → 3, ModelCheckpoint.every_n_train_steps 1 → 2")


def test_without_a_seed_random_numbers_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    options = ResumedOptions({OPTIONS_KEY: {"seed_everything": 3}})
    assert not options.keeps_random_state
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert ResumedOptions({OPTIONS_KEY: {"seed_everything": 3}}).keeps_random_state


def test_fewer_checkpoints_are_kept(run: Run) -> None:
    steps = str(run.folder / "steps")
    run.fit()
    assert len(list((run.folder / "steps").iterdir())) == 6
    run.fit(LAST, saver=RunCheckpoint(2, keep=2, dirpath=steps), max_epochs=4)
    assert run.lines == line("trainer.max_epochs 2 → 4, RunCheckpoint.every_n_steps 1 → 2, RunCheckpoint.keep 20 → 2")
    assert sorted(path.name for path in (run.folder / "steps").iterdir()) == [
        "epoch=3-step=10.ckpt",
        "epoch=3-step=12.ckpt",
    ]


def test_a_mask_of_now_is_in_force_at_once(run: Run) -> None:
    def importance(**options: Any) -> GateImportanceCallback:
        return GateImportanceCallback(**{"keep_fraction": 1.0, "warmup_steps": 0, "refresh_every": 100, **options})

    run.fit(callbacks=[importance(), StepScaleCallback()])
    changed = importance(keep_fraction=0.25)
    run.fit("epoch=1-step=5.ckpt", callbacks=[changed, StepScaleCallback(matrix_a_factor=0.5)])
    assert run.lines == [
        "GateImportanceCallback resumes with other options than the checkpoint's: keep_fraction 1.0 → 0.25.",
        "StepScaleCallback resumes with other options than the checkpoint's: matrix_a_factor 1.0 → 0.5.",
    ]
    assert changed.controller is not None
    assert changed.controller.importance is not None
    # A quarter of 24 channels in each of two layers, without a refresh on the way.
    assert changed.controller.importance.weights.sum().item() == 12
    with pytest.raises(ConfigurationError, match=r"averaged with tau=0.1 and this run has 0.3.*set tau as it was"):
        run.fit(MIDDLE, callbacks=[importance(), StepScaleCallback(tau=0.3)])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_a_mechanism_that_is_left_out_is_named(run: Run) -> None:
    run.fit(callbacks=[GateImportanceCallback()])
    run.fit(MIDDLE)
    assert run.lines == line("GateImportanceCallback on → off")
