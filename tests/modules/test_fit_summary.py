from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from module_helpers import Batches, quiet_trainer, saved_model, some_batches
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from na_lora_lightning import GateImportanceCallback
from na_lora_lightning.arguments import EvaluationOptions, LoRAOptions, ScheduleOptions
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.modules.fit_summary import FitSummaryCallback
from na_lora_lightning.modules.language import NALoRALightningModule
from na_lora_lightning.report.facts import hints
from na_lora_lightning.report.runs import read_runs


def make_module(base: str, generate: bool = True) -> NALoRALightningModule:
    seed_everything(0, verbose=False)
    return NALoRALightningModule(
        base,
        lora=LoRAOptions(r=2, alpha=4),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-2),
        schedule=ScheduleOptions(name="constant", warmup_fraction=0.0),
        evaluation=EvaluationOptions(generate=generate, max_new_tokens=3),
    )


def make_summary(**options: Any) -> tuple[FitSummaryCallback, io.StringIO]:
    summary, text = FitSummaryCallback(**options), io.StringIO()
    summary._console = Console(file=text, width=100)
    return summary, text


@pytest.fixture
def base(tmp_path: Path) -> str:
    return saved_model(tmp_path / "base")


def test_prints_what_a_fit_changed(base: str, tmp_path: Path) -> None:
    data = Batches(some_batches(3), some_batches(2, seed=50))
    untrained = make_module(base)
    (before,) = quiet_trainer(tmp_path).validate(untrained, data, verbose=False)
    answers_before = [answer.answer for answer in untrained.evaluator.answers]

    summary, text = make_summary(sample_count=2)
    module = make_module(base)
    logger = TensorBoardLogger(tmp_path, name="logs")
    trainer = quiet_trainer(tmp_path, max_epochs=4, num_sanity_val_steps=-1, callbacks=[summary], logger=logger)
    trainer.fit(module, data)
    (after,) = quiet_trainer(tmp_path).validate(module, data, verbose=False)

    expected_before = {name.removeprefix("validation/"): value for name, value in before.items()}
    expected_after = {name.removeprefix("validation/"): value for name, value in after.items()}
    assert summary.metrics_before == pytest.approx(expected_before)
    assert summary.metrics_after == pytest.approx(expected_after)
    assert set(summary.metrics_before) == {"loss", "perplexity", "token_accuracy", "exact_match", "contains_match"}
    assert summary.metrics_after["loss"] < summary.metrics_before["loss"]

    printed = text.getvalue()
    assert f"{before['validation/loss']:.4g}" in printed
    assert f"{after['validation/loss'] - before['validation/loss']:+.4g}" in printed
    assert printed.count("Prompt ") == 2
    for index, answer in enumerate(module.evaluator.answers[:2]):
        for part in (answer.prompt, answer.reference, answer.answer, answers_before[index]):
            assert " ".join(part.split()) in printed
    assert f"Adapter  {logger.log_dir}/adapter\n" in printed
    assert "Weights  those of step 12, the last\n" in printed
    for heading in ("before (step 0)", "after (step 12)"):
        assert heading in printed
    assert "The last validation" not in printed
    assert f"tensorboard --logdir {logger.log_dir}\n" in printed
    assert "12 optimizer steps" in printed


def test_prints_what_there_is(base: str, tmp_path: Path) -> None:
    summary, text = make_summary()
    quiet_trainer(tmp_path, num_sanity_val_steps=-1, callbacks=[summary]).fit(
        make_module(base, generate=False), Batches(some_batches(1), some_batches(1))
    )
    assert "loss" in text.getvalue()
    assert "exact_match" not in text.getvalue()
    assert "Prompt" not in text.getvalue()

    summary, text = make_summary()
    quiet_trainer(tmp_path / "other", callbacks=[summary]).fit(make_module(base), Batches(some_batches(1)))
    assert "Validation" not in text.getvalue()
    assert "1 optimizer steps" in text.getvalue()
    assert "Adapter" in text.getvalue()


def test_a_partial_sanity_check_is_no_measurement(base: str, tmp_path: Path) -> None:
    summary, _ = make_summary()
    data = Batches(some_batches(1), some_batches(3))
    quiet_trainer(tmp_path, num_sanity_val_steps=1, callbacks=[summary]).fit(make_module(base), data)
    assert summary.metrics_before == {}
    assert summary.metrics_after


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_before_is_the_base_model_also_when_resumed(base: str, tmp_path: Path) -> None:
    def fit(epochs: int, **options: Any) -> FitSummaryCallback:
        summary, _ = make_summary()
        saver = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
        trainer = quiet_trainer(
            tmp_path,
            max_epochs=epochs,
            num_sanity_val_steps=-1,
            enable_checkpointing=True,
            callbacks=[summary, saver],
        )
        trainer.fit(make_module(base), Batches(some_batches(3), some_batches(2)), **options)
        return summary

    first = fit(1)
    resumed = fit(2, ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert resumed.metrics_before == first.metrics_before
    assert resumed.answers_before == first.answers_before
    assert resumed.metrics_after["loss"] != first.metrics_after["loss"]


def test_says_of_which_step_it_is(base: str, tmp_path: Path) -> None:
    def fit(steps: int, **options: Any) -> str:
        summary, text = make_summary(sample_count=0)
        trainer = quiet_trainer(
            tmp_path, max_epochs=-1, max_steps=steps, check_val_every_n_epoch=1, callbacks=[summary]
        )
        trainer.fit(make_module(base, generate=False), Batches(some_batches(3), some_batches(1)), **options)
        if not options:
            trainer.save_checkpoint(tmp_path / "cut.ckpt")
        return text.getvalue()

    cut = fit(5)
    assert "before (not measured)" in cut
    assert "after (step 3)" in cut
    assert "The last validation was at step 3, and training ended at 5.\n" in cut
    # Two steps more, and no validation among them.
    resumed = fit(5, ckpt_path=tmp_path / "cut.ckpt")
    assert "after (step 3)" in resumed
    assert "The last validation was at step 3, and training ended at 5.\n" in resumed

    # As a checkpoint of an earlier version has it.
    summary, text = make_summary()
    summary.load_state_dict(
        {"metrics_before": {"loss": 2.0}, "metrics_after": {"loss": 1.0}, "answers_before": [], "answers_after": []}
    )
    summary._print(quiet_trainer(tmp_path), None)
    assert "after (unknown step)" in text.getvalue()
    assert "The last validation was at an unknown step, and training ended at 0.\n" in text.getvalue()


def test_the_curve_begins_at_the_base_model(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[dict[str, float], int | None]] = []
    logger = TensorBoardLogger(tmp_path, name="logs")
    monkeypatch.setattr(logger, "log_metrics", lambda metrics, step=None: logged.append((dict(metrics), step)))
    summary, _ = make_summary()
    quiet_trainer(tmp_path, num_sanity_val_steps=-1, callbacks=[summary], logger=logger).fit(
        make_module(base), Batches(some_batches(1), some_batches(1))
    )
    first = next(entry for entry in logged if "validation/loss" in entry[0])
    assert first == ({f"validation/{name}": value for name, value in summary.metrics_before.items()}, 0)
    assert ({"model/trainable_parameters": 992, "model/total_parameters": 7472}, 0) in logged


def test_long_and_marked_up_texts_are_printed_as_they_are(tmp_path: Path) -> None:
    from na_lora_lightning.modules.evaluation import EvaluatedAnswer
    from na_lora_lightning.modules.fit_summary import _answer_text

    answer = EvaluatedAnswer(prompt="x" * 300 + "end?", reference="[bold]r[/bold]", answer="a\nb", correct=True)
    plain = _answer_text(None, answer).plain
    assert "[bold]r[/bold]" in plain
    assert "…" + "x" * 195 + "end?\n" in plain
    assert "After      a b\n" in plain
    assert "Before" not in plain


@pytest.mark.parametrize("report", [False, True])
def test_what_the_gates_did_is_beside_before_and_after(base: str, tmp_path: Path, report: bool) -> None:
    summary, text = make_summary(sample_count=0, report=report)
    summary._console.width = 60
    logger = TensorBoardLogger(tmp_path, name="logs")
    callbacks = [GateImportanceCallback(), summary]
    trainer = quiet_trainer(tmp_path, num_sanity_val_steps=-1, callbacks=callbacks, logger=logger, log_every_n_steps=1)
    trainer.fit(make_module(base), Batches(some_batches(3), some_batches(2, seed=50)))
    lines = text.getvalue().splitlines()
    (run,) = read_runs([logger.log_dir])
    start = next(index for index, line in enumerate(lines) if line.startswith("Gates    "))
    assert all(len(line) <= 60 for line in lines[start:-1])
    assert " ".join(line[9:] for line in lines[start:-1]) == " ".join(hints(run))
    page = Path(logger.log_dir) / "report.html"
    assert lines[-1] == f"Report   {page if report else f'na-lora report {logger.log_dir}'}"
    assert page.exists() == report
    # The same prompts before and after, in the history and in TensorBoard.
    assert len(run.samples) == 4
    assert all(sample["before"] is not None and sample["after"] is not None for sample in run.samples)
    tags = EventAccumulator(logger.log_dir).Reload().Tags()["tensors"]
    assert "samples/text_summary" in tags


def test_a_negative_sample_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="sample_count is -1"):
        FitSummaryCallback(sample_count=-1)
