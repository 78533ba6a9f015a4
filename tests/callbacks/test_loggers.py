"""What the two callbacks write to the loggers of a trainer, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from foreign_modules import Manual
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning_models import ForeignModule, assert_equal_states, both, fitted_alone, loader, lora_state, make_trainer

from na_lora_lightning import GateImportanceCallback, StepScaleCallback, ViewOptions
from na_lora_lightning import lightning_internals as trainer_progress
from na_lora_lightning.errors import ConfigurationError


class Recorder(Logger):
    """Keeps what it is given."""

    name, version = "recorder", 0

    def __init__(self) -> None:
        self.steps: dict[str, list[int]] = {}

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        for metric in metrics:
            self.steps.setdefault(metric, []).append(step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class Logs(ForeignModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss.detach())
        return loss


@pytest.mark.parametrize(
    "options",
    [
        {"log_every_n_steps": 3},
        {"log_every_n_steps": 1},
        {"log_every_n_steps": 2, "accumulate_grad_batches": 2},
    ],
)
def test_the_callbacks_log_when_the_module_does(tmp_path: Path, options: dict[str, Any]) -> None:
    first, second = Recorder(), Recorder()
    make_trainer(tmp_path, callbacks=both(), logger=[first, second], **options).fit(Logs(), loader())
    wanted = first.steps.get("loss", [])
    assert len(wanted) == 8 // options.get("accumulate_grad_batches", 1) // options["log_every_n_steps"]
    for metric in ("gates/mask_churn", "gates/step_scale_deviation", "gates/selection_misalignment"):
        assert first.steps.get(metric, []) == wanted, metric
        assert second.steps.get(metric, []) == wanted, metric


def test_manual_accumulation_logs_its_steps(tmp_path: Path) -> None:
    """A logging step that falls between two optimizer steps is logged with the next of them."""
    recorder = Recorder()
    make_trainer(tmp_path, callbacks=both(), logger=recorder, log_every_n_steps=3).fit(Manual(2), loader())
    assert recorder.steps["loss"] == [2, 5]
    assert recorder.steps["gates/mask_churn"] == recorder.steps["gates/selection_misalignment"] == [3, 5]


def test_files_of_the_loggers(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tensorboard")]
    view = ViewOptions(layer_curves=True)
    callbacks = [GateImportanceCallback(0.5, histogram_every_n_steps=4, view=view), StepScaleCallback(view=view)]
    make_trainer(tmp_path, callbacks=callbacks, logger=loggers, log_every_n_steps=4).fit(ForeignModule(), loader())
    header, *rows = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    assert {"gates/mask_churn", "gate_step_scale_deviation/layer_00", "gates/selection_share"} <= set(header.split(","))
    assert {row.split(",")[header.split(",").index("step")] for row in rows} == {"3", "7"}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard" / "version_0"), {"histograms": 9}).Reload()
    assert [event.step for event in events.Scalars("gates/mask_churn")] == [3, 7]
    assert [event.step for event in events.Histograms("gate_responsiveness_of_channels/layer_00")] == [0, 4]


def test_without_a_logger_nothing_is_measured_and_training_is_the_same(tmp_path: Path) -> None:
    callbacks, module = both(), ForeignModule()
    make_trainer(tmp_path, callbacks=callbacks, logger=Recorder()).fit(module, loader())
    assert_equal_states(lora_state(module), fitted_alone())
    make_trainer(tmp_path, callbacks=callbacks, logger=False).fit(ForeignModule(), loader())
    assert callbacks[0].controller.misalignment is None


def test_a_lightning_that_keeps_its_steps_elsewhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_progress, "_LOGGED_STEP", "fit_loop._moved")
    module = ForeignModule()
    with pytest.raises(ConfigurationError, match=r"lightning \d\S* has no Trainer\.fit_loop\._moved"):
        make_trainer(tmp_path, callbacks=both()).fit(module, loader())
    assert module.losses == []
