"""Schedulers of torch and transformers by their import path: their own rates, resumed, or one sentence."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import Callback, seed_everything
from module_helpers import Fit, quiet_trainer, saved_model, write_records
from torch import nn
from torch.optim import lr_scheduler

from na_lora_lightning.arguments import AdapterOptions, LoRAOptions, ScheduleOptions
from na_lora_lightning.checkpoints.callbacks import RunCheckpoint
from na_lora_lightning.data import InstructionDataModule
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.modules.language import NALoRALightningModule
from na_lora_lightning.modules.resumed_optimizer import describe_schedule, require_same_schedules
from na_lora_lightning.modules.schedules import make_schedule, set_rate

RATE = 1e-2
STEPS = 10
TORCH = "torch.optim.lr_scheduler."
# The resumed fit goes on in the folder of the first.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")


class Rates(Callback):
    """The rate and momentum of each step, by its number."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[float, float]] = {}

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        group = optimizer.param_groups[0]
        self.seen[trainer.global_step] = (float(group["lr"]), group["betas"][0])


class Run:
    """Fits of two epochs of five steps, with a checkpoint after each step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.records = saved_model(folder / "base"), write_records(folder / "records.jsonl", 20)

    def fit(self, schedule: ScheduleOptions, step: int | None = None, rate: float = RATE, **options: Any) -> Rates:
        seed_everything(0, verbose=False)
        self.module = NALoRALightningModule(
            self.base,
            lora=LoRAOptions(r=2, alpha=4),
            optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=0.0),
            schedule=schedule,
            adapter=AdapterOptions(write="never"),
        )
        rates = Rates()
        saver = RunCheckpoint(1, keep=20, dirpath=str(self.folder / "steps"))
        settings = {"max_epochs": 2, "enable_checkpointing": True, "limit_val_batches": 1, **options}
        trainer = quiet_trainer(self.folder, callbacks=[saver, rates], **settings)
        data = InstructionDataModule(self.base, train=self.records, validation=self.records, batch_size=4)
        found = None if step is None else next((self.folder / "steps").glob(f"*step={step}.ckpt"))
        trainer.fit(self.module, data, ckpt_path=found)
        return rates

    @property
    def last(self) -> dict[str, Any]:
        (path,) = (self.folder / "steps").glob("*step=10.ckpt")
        return torch.load(path, weights_only=True)  # type: ignore[no-any-return]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


SCHEDULES: dict[str, tuple[ScheduleOptions, Any]] = {
    "one cycle": (
        ScheduleOptions(f"{TORCH}OneCycleLR", options={"max_lr": 0.05}),
        lambda it: lr_scheduler.OneCycleLR(it, max_lr=0.05, total_steps=STEPS),
    ),
    "steps": (
        ScheduleOptions(f"{TORCH}StepLR", options={"step_size": 3, "gamma": 0.5}),
        lambda it: lr_scheduler.StepLR(it, 3, 0.5),
    ),
    "cosine": (
        ScheduleOptions(f"{TORCH}CosineAnnealingLR", options={"T_max": 4, "eta_min": 1e-4}),
        lambda it: lr_scheduler.CosineAnnealingLR(it, 4, 1e-4),
    ),
    "epochs": (
        ScheduleOptions(f"{TORCH}ExponentialLR", options={"gamma": 0.5}, interval="epoch"),
        lambda it: lr_scheduler.ExponentialLR(it, 0.5),
    ),
    "restarts": (
        ScheduleOptions(
            "transformers.get_cosine_with_hard_restarts_schedule_with_warmup",
            warmup_steps=2,
            options={"num_cycles": 2},
        ),
        lambda it: transformers.get_cosine_with_hard_restarts_schedule_with_warmup(it, 2, STEPS, num_cycles=2),
    ),
    "a fraction": (
        ScheduleOptions("transformers.optimization.get_linear_schedule_with_warmup", warmup_fraction=0.3),
        lambda it: transformers.get_linear_schedule_with_warmup(it, 3, STEPS),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_are_the_schedulers_own_and_resumed_bitwise(run: Run, name: str) -> None:
    schedule, make = SCHEDULES[name]
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=RATE)
    theirs = make(optimizer)
    expected = {}
    for step in range(STEPS):
        expected[step] = (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0])
        optimizer.step()
        if schedule.interval == "step" or step % 5 == 4:
            theirs.step()
    assert run.fit(schedule).seen == expected
    whole, weights = run.last, run.module.state_dict()
    assert run.fit(schedule, step=7).seen == {step: expected[step] for step in range(7, STEPS)}
    assert run.last["lr_schedulers"] == whole["lr_schedulers"]
    assert all(torch.equal(value, run.module.state_dict()[key]) for key, value in weights.items())


@pytest.mark.parametrize(("monitor", "every", "steps"), [("validation/loss", 5, (5, 8)), ("train/loss", 1, (7, 8))])
def test_a_plateau_follows_its_metric_and_is_resumed(run: Run, monitor: str, every: int, steps: tuple[int]) -> None:
    # Nothing is good enough, so that the rate halves at each look but the first.
    options = {"factor": 0.5, "patience": 0, "threshold": 100.0, "threshold_mode": "abs"}
    schedule = ScheduleOptions(f"{TORCH}ReduceLROnPlateau", options=options, monitor=monitor)
    settings = {"max_epochs": 3, "num_sanity_val_steps": 2}
    seen = run.fit(schedule, **settings).seen
    assert {step: rate for step, (rate, _) in seen.items()} == {
        step: RATE * 0.5 ** max(step // every - 1, 0) for step in range(15)
    }
    weights = run.module.state_dict()
    for start in steps:
        again = run.fit(schedule, step=start, **settings).seen
        assert again == {step: value for step, value in seen.items() if step >= start}
        assert all(torch.equal(value, run.module.state_dict()[key]) for key, value in weights.items())


PLATEAU = f"{TORCH}ReduceLROnPlateau"


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"name": "sine"}, "schedule.name='sine' is unknown; use one of 'linear', .*, or the import path"),
        ({"interval": "epoch"}, "schedule.interval='epoch' does not work with the schedule 'cosine'"),
        ({"name": f"{TORCH}Sine"}, "is no scheduler of torch or transformers"),
        ({"name": "torch.optim.AdamW"}, "is no scheduler of torch or transformers"),
        ({"name": "os.system"}, "is no scheduler of torch or transformers"),
        ({"name": "transformers.get_scheduler"}, "is no scheduler of torch or transformers"),
        ({"name": f"{TORCH}OneCycleLR"}, "cannot be made .*; set max_lr in schedule.options"),
        ({"name": f"{TORCH}StepLR", "options": {"size": 1}}, "cannot be made .*unexpected.*; correct schedule.options"),
        ({"name": f"{TORCH}StepLR", "options": {"step_size": 1}, "warmup_steps": 3}, "knows no warm-up"),
        ({"name": f"{TORCH}SequentialLR"}, r"^the schedule [^(]* is made of functions or other schedulers"),
        ({"name": f"{TORCH}LambdaLR"}, r"^the schedule [^(]* is made of functions or other schedulers"),
        ({"name": PLATEAU}, "set schedule.monitor, such as validation/loss"),
        ({"name": f"{TORCH}StepLR", "options": {"step_size": 1}, "monitor": "train/loss"}, "looks at no metric"),
        ({"monitor": "train/loss"}, "looks at no metric"),
        (
            {"name": PLATEAU, "monitor": "val_loss"},
            "'val_loss', which this fit does not measure; use one of train/loss",
        ),
        ({"name": PLATEAU, "monitor": "validation/loss", "interval": "epoch"}, "whenever its metric is measured"),
    ],
)
def test_what_cannot_work_is_one_sentence(run: Run, schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        run.fit(ScheduleOptions(**schedule))


def test_a_plateau_of_a_fit_without_validation_is_refused(run: Run) -> None:
    schedule = ScheduleOptions(PLATEAU, monitor="validation/loss")
    with pytest.raises(ConfigurationError, match="no validation to measure it in; give data"):
        run.fit(schedule, limit_val_batches=0)


def test_a_schedule_without_an_end_is_refused() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    for name in (f"{TORCH}OneCycleLR", "transformers.get_linear_schedule_with_warmup"):
        options = {"max_lr": 1.0} if "OneCycle" in name else {}
        with pytest.raises(ConfigurationError, match=r"^the schedule [^(]* needs a fit with an end"):
            make_schedule(ScheduleOptions(name, options=options), optimizer, float("inf"))
    make_schedule(ScheduleOptions(f"{TORCH}StepLR", options={"step_size": 1}), optimizer, float("inf"))


def test_what_a_state_holds_cannot_change_on_the_way(run: Run) -> None:
    one_cycle, steps = SCHEDULES["one cycle"][0], SCHEDULES["steps"][0]
    run.fit(one_cycle)
    for schedule, changed, options in (
        (one_cycle, "total_steps=10 and this run's 15", {"max_epochs": 3}),
        (replace(one_cycle, options={"max_lr": 0.05, "pct_start": 0.4}), "_schedule_phases=.*", {}),
        (steps, r"class_path=torch\.optim\.lr_scheduler\.OneCycleLR and this run's torch", {}),
        (ScheduleOptions("constant"), "class_path=.* and this run's a named one", {}),
    ):
        with pytest.raises(ConfigurationError, match=f"the checkpoint's schedule has {changed}.* cannot change"):
            run.fit(schedule, step=7, **options)
    assert max(run.fit(one_cycle, step=7).seen) == STEPS - 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MultiStepLR", [{"milestones": [2, 4]}, {"milestones": [2, 5]}]),
        ("CyclicLR", [{"base_lr": 0.01, "max_lr": 0.1}, {"base_lr": 0.01, "max_lr": 0.1, "mode": "triangular2"}]),
        ("CosineAnnealingWarmRestarts", [{"T_0": 3}, {"T_0": 4}]),
        ("PolynomialLR", [{}, {"power": 2.0}]),
        ("ReduceLROnPlateau", [{}, {"patience": 2}]),
    ],
)
def test_states_are_plain_and_tell_options_apart(tmp_path: Path, name: str, options: list[dict[str, Any]]) -> None:
    described = []
    monitor = "train/loss" if "Plateau" in name else None
    for values in (options[0], options[0], options[1]):
        optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=RATE)
        schedule = make_schedule(ScheduleOptions(TORCH + name, options=values, monitor=monitor), optimizer, STEPS)
        described.append([describe_schedule(schedule)])
        torch.save([schedule.state_dict(), described], tmp_path / "state.pt")
        torch.load(tmp_path / "state.pt", weights_only=True)
    require_same_schedules(described[0], described[1])
    with pytest.raises(ConfigurationError, match="cannot change on the way"):
        require_same_schedules(described[0], described[2])


def test_a_scheduler_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "new").mkdir()
    fit = Fit(tmp_path, capsys)
    fit.options["model"]["schedule"] = {"name": f"{TORCH}StepLR", "options": {"step_size": 2}}
    assert fit("--model.schedule.options.gamma=0.5", "--trainer.max_steps=6") == 0
    assert fit.checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == 2e-4 * 0.5**3
    assert "schedule.name='torch.optim.lr_scheduler.Step' is no scheduler" in Fit(tmp_path / "new", capsys).error(
        f"--model.schedule.name={TORCH}Step"
    )


def test_a_rate_that_was_found_is_where_a_schedule_begins() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    schedule = lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=3)
    set_rate(optimizer, 0.4, schedule)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4])
    set_rate(optimizer, 0.5, lr_scheduler.ReduceLROnPlateau(optimizer))
    assert optimizer.param_groups[0]["lr"] == 0.5
    with pytest.raises(ConfigurationError, match=r"OneCycleLR has its own in schedule\.options; leave LearningRateF"):
        set_rate(optimizer, 0.4, lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=4))
