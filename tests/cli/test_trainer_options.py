"""Options of the trainer that cannot work are one sentence, and a limit that is given is the one that holds."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from module_helpers import Fit

from na_lora_lightning.cli.main import main
from na_lora_lightning.cli.trainer_options import require_possible, with_end
from na_lora_lightning.errors import ConfigurationError


@pytest.mark.parametrize(
    ("given", "epochs"),
    [
        ({}, 3),
        ({"max_epochs": 5}, 5),
        ({"max_steps": 20}, -1),
        ({"max_steps": -1}, 3),
        ({"max_time": "00:01:00:00"}, -1),
        ({"max_steps": 20, "max_epochs": 2}, 2),
        ({"min_epochs": 2}, 3),
        ({"min_epochs": 7}, 7),
        ({"max_epochs": -1}, -1),
    ],
)
def test_a_limit_that_is_given_wins(given: dict[str, Any], epochs: int) -> None:
    assert with_end(given) == {**given, "max_epochs": epochs}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches is 0, .* set it to 1 or more"),
        ({"check_val_every_n_epoch": 0}, "trainer.check_val_every_n_epoch is 0, .* set it to 1 or more"),
        ({"gradient_clip_val": -1.0}, "trainer.gradient_clip_val is -1.0, .* set it to 0 or more"),
        ({"log_every_n_steps": -1}, "trainer.log_every_n_steps is -1, .* set it to 0 or more"),
        ({"num_sanity_val_steps": -2}, "trainer.num_sanity_val_steps is -2, .* set it to -1 or more"),
        ({"val_check_interval": 0}, "trainer.val_check_interval is 0, .* a part of an epoch above 0"),
        ({"max_steps": 0}, "trainer.max_steps is 0, and a fit without optimizer steps trains nothing"),
        ({"max_epochs": 0}, "trainer.max_epochs is 0, and a fit without epochs trains nothing"),
        ({"limit_train_batches": 0}, "trainer.limit_train_batches is 0, and a fit without batches trains nothing"),
        ({"min_epochs": 5, "max_epochs": 4}, "min_epochs is 5 and trainer.max_epochs is 4"),
        ({"min_steps": 5, "max_steps": 4}, "min_steps is 5 and trainer.max_steps is 4"),
        ({"accelerator": "cpu", "devices": "4000"}, "trainer.devices is 4000, and each is a process of its own"),
    ],
)
def test_impossible_numbers_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        require_possible(given, fits=True)


def test_possible_numbers_pass() -> None:
    require_possible({"max_epochs": -1, "max_steps": -1, "min_steps": 5, "gradient_clip_val": None}, fits=True)
    require_possible({"max_steps": 0, "accelerator": "cpu", "devices": "auto"}, fits=False)


# ---- on the command line ----


@pytest.fixture
def fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Fit:
    return Fit(tmp_path, capsys)


def test_max_steps_is_not_cut_short_by_the_default(fit: Fit) -> None:
    assert fit("--trainer.max_steps", "14") == 0
    assert fit.steps == 14
    # The configuration that was saved says no number of epochs, so that it can be used with another limit.
    (saved,) = fit.folder.glob("run/**/config.yaml")
    assert yaml.safe_load(saved.read_text())["trainer"]["max_epochs"] is None
    assert main(["fit", "--config", str(saved), "--trainer.max_steps", "15"]) == 0
    assert fit.steps == 15


def test_without_a_limit_there_are_three_epochs(fit: Fit) -> None:
    assert fit() == 0
    assert fit.steps == 12


@pytest.mark.parametrize("form", ["--config {} fit", "-c {} fit", "--config={} fit", "-c {} --config {} fit -c {}"])
def test_options_may_stand_before_the_command(fit: Fit, form: str) -> None:
    fit.options["trainer"]["max_steps"] = 5
    file = fit.file("run.yaml", fit.options)
    assert main(["--trainer.max_epochs", "1", *form.format(file, file, file).split()]) == 0
    assert fit.steps == 4


def test_a_file_may_have_a_part_for_each_command(fit: Fit) -> None:
    fit.options["trainer"]["max_steps"] = 2
    file = fit.file("all.yaml", {"fit": fit.options, "test": {"seed_everything": 3}})
    assert main(["--config", file, "fit"]) == 0
    assert fit.steps == 2
    assert main([f"--config={file}", "fit", "--trainer.max_steps", "3"]) == 0
    assert fit.steps == 3


def test_a_missing_command_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "run.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: no command is given; use one of fit, validate")


def callback(name: str, **options: object) -> list[str]:
    return [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{key}={value}" for key, value in options.items())]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            callback("EarlyStopping", monitor="val_loss"),
            "EarlyStopping monitors 'val_loss', which this fit does not log",
        ),
        (
            callback("ModelCheckpoint", monitor="validation/exact_match"),
            "ModelCheckpoint monitors 'validation/exact_match', which this fit does not log; monitor one of train/loss",
        ),
        (
            [*callback("EarlyStopping", monitor="validation/loss"), "--trainer.limit_val_batches=0"],
            "EarlyStopping monitors 'validation/loss', and there is no validation to measure it in",
        ),
        (callback("ModelPruning", pruning_fn="l1_unstructured"), "ModelPruning prunes base weights"),
        (callback("EarlyStopping", monitor="train/loss", mode="up"), "`mode` can be min, max, got up."),
        (
            ["--trainer.precision=transformer-engine"],
            "Requirement 'transformer_engine>=0.11.0' not met; try `pip install",
        ),
        (["--trainer.accelerator=tpu"], "Requirement 'torch_xla>=1.13' not met"),
        (["--trainer.val_check_interval=1000"], "`val_check_interval` (1000) must be less than or equal to the number"),
        (["--trainer.check_val_every_n_epoch=4"], "the fit has 3 epochs, so it would never validate"),
        (["--trainer.min_steps=100"], "trainer.min_steps is 100 and the fit ends after 12 optimizer steps"),
        (["--trainer.max_time=00:00:10:00"], "the schedule 'cosine' needs a fit with an end"),
        (["--model.schedule.name=warmup_stable_decay"], "; set num_decay_steps in schedule.options."),
        (["--model.schedule.name=cosine_with_min_lr"], "One of min_lr or min_lr_rate should be set"),
        (["--model.schedule.options={num_cycles: x}"], "the schedule 'cosine' cannot be made (could not convert"),
    ],
)
def test_what_cannot_run_is_one_sentence_before_training(fit: Fit, arguments: list[str], message: str) -> None:
    assert message in fit.error(*arguments)


def test_a_metric_of_a_foreign_callback_is_awaited(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    (fit.folder / "their_callbacks.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Theirs(Callback):\n"
        "    def on_train_epoch_end(self, trainer, pl_module):\n"
        "        pl_module.log('theirs', 1.0)\n"
    )
    monkeypatch.syspath_prepend(str(fit.folder))
    theirs = callback("their_callbacks.Theirs")
    assert fit(*theirs, *callback("EarlyStopping", monitor="theirs", patience="9"), "--trainer.max_epochs=1") == 0
    assert fit.steps == 4


def test_a_default_that_is_no_plain_text_is_written_and_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = Fit(tmp_path, capsys)
    timer = ["--trainer.max_epochs=1", "--trainer.callbacks+=Timer", "--trainer.callbacks.duration=00:00:10:00"]
    assert fit(*timer) == 0
    (saved,) = tmp_path.glob("run/**/config.yaml")
    (callback,) = yaml.safe_load(saved.read_text())["trainer"]["callbacks"]
    assert callback["init_args"] == {"duration": "00:00:10:00", "interval": "step", "verbose": True}
    assert main(["fit", "--config", str(saved)]) == 0
    capsys.readouterr()
    assert fit(*timer, "--print_config") == 0
    assert "interval: step\n" in capsys.readouterr().out


def test_going_on_with_a_run_that_began_with_last_names_its_epochs_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    fit = Fit(tmp_path, capsys)
    assert fit("--ckpt_path=last", "--trainer.max_epochs=1") == 0
    caplog.clear()
    assert fit("--ckpt_path=last", "--trainer.max_epochs=2") == 0
    changes = [record.getMessage() for record in caplog.records if "other options" in record.getMessage()]
    assert changes == ["Training resumes with other options than the checkpoint's: trainer.max_epochs 1 → 2."]


def test_a_rate_is_found_from_the_command_line_and_follows_schedule_and_groups(
    fit: Fit, caplog: pytest.LogCaptureFixture
) -> None:
    plus = {"optimizer_cls": "torch.optim.AdamW", "lr": 1e-6, "loraplus_lr_ratio": 16}
    optimizer = {"class_path": "peft.optimizers.create_loraplus_optimizer", "init_args": plus}
    fit.options["model"]["optimizer"] = optimizer
    fit.options["model"]["schedule"] = {"name": "linear", "warmup_steps": 2}
    finder = callback(
        "LearningRateFinder", num_training_steps=20, min_lr=1e-5, max_lr=1e-2, early_stop_threshold="null"
    )
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={fit.folder / 'run'}"]
    assert fit(*finder, *logger, "--trainer.max_steps=6") == 0
    (found,) = [float(m.removeprefix("Learning rate set to ")) for m in caplog.messages if "Learning rate set" in m]
    assert 1e-5 < found < 1e-2
    groups = fit.checkpoint["optimizer_states"][0]["param_groups"]
    assert groups[0]["initial_lr"] == pytest.approx(found)
    assert {round(group["initial_lr"] / found) for group in groups} == {1, 16}
    (schedule,) = fit.checkpoint["lr_schedulers"]
    assert schedule["base_lrs"] == [group["initial_lr"] for group in groups]
    (curves,) = fit.folder.glob("run/**/metrics.csv")
    rows = csv.DictReader(curves.read_text().splitlines())
    rates = [float(row["lr-AdamW/pg1"]) for row in rows if row.get("lr-AdamW/pg1")]
    expected = [found * min(step / 2, (6 - step) / 4) for step in range(6)]
    assert rates == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_a_batch_size_is_found_from_the_command_line(fit: Fit) -> None:
    finder = callback("BatchSizeFinder", init_val=1, max_trials=2, steps_per_trial=1)
    assert fit(*finder, "--trainer.max_epochs=1", "--data.batch_size=7") == 0
    # Of 16 records in batches of two, and not of seven.
    assert fit.steps == 8


def test_a_fit_stops_where_the_rule_of_early_stopping_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # No loss falls by a thousand: the first of four steps each is the best, and two more end the fit.
    rule = callback("EarlyStopping", monitor="validation/loss", patience=2, min_delta=1000)
    rule += ["--model.schedule.name=constant", "--model.schedule.warmup_steps=0"]
    (tmp_path / "whole").mkdir()
    whole = Fit(tmp_path / "whole", capsys)
    assert whole(*rule, "--trainer.max_epochs=9") == 0
    assert whole.steps == 12
    (tmp_path / "halves").mkdir()
    halves = Fit(tmp_path / "halves", capsys)
    assert halves(*rule, "--trainer.max_epochs=2") == 0
    assert halves.steps == 8
    assert halves(*rule, "--trainer.max_epochs=9", "--ckpt_path=last") == 0
    assert halves.steps == 12
    weights = halves.checkpoint["state_dict"]
    assert all(torch.equal(value, weights[name]) for name, value in whole.checkpoint["state_dict"].items())
    (state,) = [value for name, value in halves.checkpoint["callbacks"].items() if name.startswith("EarlyStopping")]
    assert (state["wait_count"], state["stopped_epoch"]) == (2, 2)
