"""What the two callbacks write to the loggers of a trainer and to history.jsonl, and when."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_modules import Manual
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning_models import ForeignModule, assert_equal_states, both, fitted_alone, loader, lora_state, make_trainer
from tiny_models import LLAMA_TARGETS, random_batch, tiny_llama, with_lora

from na_lora_lightning import GateImportanceCallback, StepScaleCallback, ViewOptions, nonlinearity_aware
from na_lora_lightning import lightning_internals as trainer_progress
from na_lora_lightning.errors import ConfigurationError, ViewWarning
from na_lora_lightning.history import FILE, HistoryWriter, read_history
from na_lora_lightning.report.page import make_page
from na_lora_lightning.report.runs import read_runs


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
    importance = GateImportanceCallback(0.5, histogram_every_n_steps=4, view=view)
    callbacks = [importance, StepScaleCallback("channel", normalize=True, view=view)]
    make_trainer(tmp_path, callbacks=callbacks, logger=loggers, log_every_n_steps=4).fit(ForeignModule(), loader())
    header, *rows = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    assert {"gates/mask_churn", "gate_step_scale_deviation/layer_00", "gates/selection_share"} <= set(header.split(","))
    assert {row.split(",")[header.split(",").index("step")] for row in rows} == {"3", "7"}

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard" / "version_0"), {"histograms": 9}).Reload()
    assert [event.step for event in events.Scalars("gates/mask_churn")] == [3, 7]
    assert [event.step for event in events.Histograms("responsiveness_of_channels/layer_00")] == [0, 4]


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


def test_numbers_are_short_and_texts_of_any_kind_are_kept(tmp_path: Path) -> None:
    writer = HistoryWriter(tmp_path / "run")
    values = {"loss": 1.23456789, "nan": math.nan, "infinite": math.inf, "large": 135_000_000.0, "count": 7}
    writer.write("validation", 3, metrics=values, samples=[{"answer": "<b>é\ud800\n\u2028"}])
    history = read_history(tmp_path / "run")
    assert history is not None
    (entry,) = history.validations
    assert entry["metrics"] == {"loss": 1.2346, "nan": None, "infinite": None, "large": 135_000_000.0, "count": 7}
    assert entry["samples"] == [{"answer": "<b>é\ud800\n\u2028"}]
    assert (tmp_path / "run" / FILE).read_bytes().count(b"\n") == 1


def test_no_folder_no_file_and_no_line_that_counts(tmp_path: Path) -> None:
    assert read_history(tmp_path / "nowhere") is None
    (tmp_path / FILE).write_text('[]\nnull\n{"type": "step"}\n{"type": 1, "step": 2}\nno JSON\n\n')
    history = read_history(tmp_path)
    assert history is not None
    assert (history.starts, history.steps, history.last_step) == ([], [], 0)


@given(cut=st.integers(0, 10_000), resumed_from=st.integers(0, 5))
def test_a_run_killed_anywhere_and_resumed_reads_like_one_that_was_not(
    tmp_path_factory: Any, cut: int, resumed_from: int
) -> None:
    """Whatever of the first part was lost, the second repeats every step after the checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    writer = HistoryWriter(folder)
    writer.write("start", 0, sites=[])
    for step in range(1, 6):
        writer.write("step", step, metrics={"loss": float(step)})
    writer.write("validation", 5, metrics={"validation/loss": 5.0})
    content = writer.path.read_bytes()
    head = content.index(b"\n") + 1
    lines = content.split(b"\n")
    # A kill loses nothing of what was written before the checkpoint.
    kept = len(b"\n".join(lines[: resumed_from + 1])) + 1
    writer.path.write_bytes(content[: max(head, kept, len(content) - cut)])
    torn = read_history(folder)
    assert torn is not None
    assert [entry["step"] for entry in torn.steps] == list(range(1, len(torn.steps) + 1))
    writer.write("start", resumed_from, sites=[])
    for step in range(resumed_from + 1, 9):
        writer.write("step", step, metrics={"loss": float(step)})
    writer.write("end", 8, outcome="ended")
    history = read_history(folder)
    assert history is not None
    assert [(entry["step"], entry["metrics"]["loss"]) for entry in history.steps] == [
        (n, float(n)) for n in range(1, 9)
    ]
    assert len(history.starts) == 2
    assert history.end is not None
    assert history.last_step == 8
    for line in writer.path.read_bytes().splitlines():
        if line.startswith(b'{"type":"start"'):
            assert json.loads(line)["sites"] == []


def test_a_new_run_in_the_same_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    writer = HistoryWriter(tmp_path)
    writer.write("start", 0)
    writer.write("step", 4, metrics={})
    writer.write("end", 4, outcome="ended")
    writer.write("start", 0)
    history = read_history(tmp_path)
    assert history is not None
    assert history.steps == []
    assert history.end is None


def test_a_plain_loop_keeps_its_own(tmp_path: Path) -> None:
    """With the losses that it notes, also where it resumes, and in the form that the report reads."""
    model = with_lora(tiny_llama(), LLAMA_TARGETS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    state: Any = None
    for _ in range(2):
        with nonlinearity_aware(model, optimizer, measure_every=2, total_steps=8, history=tmp_path / "loop") as gates:
            if state is not None:
                gates.load_state_dict(state)
            for step in range(4):
                loss = model(**random_batch(step)).loss
                gates.notes["loss"] = loss.item()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            expected = gates.gate_metrics().sites["selection_misalignment"]
            state = gates.state_dict()
    (run,) = read_runs([str(tmp_path / "loop")])
    assert [start["step"] for start in run.history.starts] == [0, 4]
    assert run.series("loss")[0] == [2, 4, 6, 8]
    assert run.history.steps[-1]["gates"]["selection_misalignment"] == pytest.approx(expected, rel=1e-4)
    assert run.labels == ["layer_00", "layer_01"]
    assert run.state == "ended at step 8"
    assert "loss went from" in make_page([run])


def test_a_history_that_cannot_be_written_does_not_end_a_loop(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = with_lora(tiny_llama(), LLAMA_TARGETS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def train() -> int:
        with nonlinearity_aware(model, optimizer, measure_every=1, history=tmp_path / "file") as gates:
            for step in range(2):
                model(**random_batch(step)).loss.backward()
                optimizer.step()
        return gates.steps

    with pytest.warns(ViewWarning, match=r"the history cannot be written to .*, and training goes on without"):
        assert train() == 2
