"""What a fit changed: metrics and answers before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from textwrap import wrap
from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from na_lora_lightning.callbacks.gate_callback import gate_callbacks
from na_lora_lightning.callbacks.logger_kinds import is_tensorboard
from na_lora_lightning.checkpoints.measurements import STAGE, Measurement, WrittenAdapter, heading, validation_metrics
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.history import FILE
from na_lora_lightning.modules.evaluation import EvaluatedAnswer
from na_lora_lightning.report.facts import hints
from na_lora_lightning.report.runs import read_runs

# The order of the table; what else validation logs comes below.
_FIRST_METRICS = ("contains_match", "exact_match", "loss", "perplexity", "token_accuracy")
_LONGEST_TEXT = 200
# Of what follows a label.
_INDENT = 9


class FitSummaryCallback(Callback):
    """Prints, at the end of fit, the validation metrics and some answers before and after training.

    "Before" is Lightning's sanity check of the untrained adapter, and is only a measurement if it covers the whole
    validation data: set ``num_sanity_val_steps=-1`` on the trainer. It is also written to the loggers as step 0, so
    that validation curves begin at the base model. "After" is the last validation of the fit, of whose step it says so.
    Both survive a resumed fit. Whatever was not measured is left out.

    Args:
        sample_count: Number of answers to print.
        report: Write the run's page, as ``na-lora report`` does, which takes a few seconds.

    Raises:
        ConfigurationError: ``sample_count`` is negative.
    """

    def __init__(self, sample_count: int = 3, report: bool = False) -> None:
        if sample_count < 0:
            raise ConfigurationError(f"sample_count is {sample_count}; set it to 0 or more.")
        self.sample_count = sample_count
        self.report = report
        self.metrics_before: dict[str, float] = {}
        self.metrics_after: dict[str, float] = {}
        # Optimizer steps until then; None where it is not known.
        self.step_before: int | None = None
        self.step_after: int | None = None
        self.answers_before: list[EvaluatedAnswer] = []
        self.answers_after: list[EvaluatedAnswer] = []
        self._started = 0.0
        self._resumed = False
        self._console = Console()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self._started = perf_counter()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps what validation measured."""
        if trainer.state.fn != "fit":
            return
        metrics = validation_metrics(trainer)
        answers = list(getattr(getattr(pl_module, "evaluator", None), "answers", []))[: self.sample_count]
        if not trainer.sanity_checking:
            self.metrics_after, self.answers_after = metrics, answers
            self.step_after = trainer.global_step
        elif trainer.num_sanity_val_steps == float("inf") and not self._resumed:
            # A few batches would be compared with the whole data, and a resumed fit does not begin at the base model.
            self.metrics_before, self.answers_before = metrics, answers
            self.step_before = trainer.global_step
            for logger in trainer.loggers:
                logger.log_metrics({STAGE + name: value for name, value in metrics.items()}, step=0)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the summary."""
        if trainer.progress_bar_callback is not None:
            # Otherwise the bar, which is still live, is drawn once more below the summary.
            trainer.progress_bar_callback.teardown(trainer, pl_module, stage="fit")
        if trainer.is_global_zero:
            self._print(trainer, getattr(pl_module, "written_adapter", None))
        self._resumed = False

    @override
    def state_dict(self) -> dict[str, Any]:
        """What was measured, as plain values."""
        return {
            "metrics_before": dict(self.metrics_before),
            "metrics_after": dict(self.metrics_after),
            "step_before": self.step_before,
            "step_after": self.step_after,
            "answers_before": [asdict(answer) for answer in self.answers_before],
            "answers_after": [asdict(answer) for answer in self.answers_after],
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what was measured before an interruption."""
        self._resumed = True
        self.metrics_before = dict(state_dict["metrics_before"])
        self.metrics_after = dict(state_dict["metrics_after"])
        self.step_before = state_dict.get("step_before", 0 if self.metrics_before else None)
        self.step_after = state_dict.get("step_after")
        self.answers_before = [EvaluatedAnswer(**answer) for answer in state_dict["answers_before"]]
        self.answers_after = [EvaluatedAnswer(**answer) for answer in state_dict["answers_after"]]

    @property
    def measurements(self) -> list[Measurement]:
        """What was measured before and after training."""
        return [
            Measurement("before", self.step_before, self.metrics_before),
            Measurement("after", self.step_after, self.metrics_after),
        ]

    def _print(self, trainer: Trainer, adapter: WrittenAdapter | None) -> None:
        console = self._console
        if self.metrics_before or self.metrics_after:
            console.print(_metrics_table(*self.measurements))
            if self.metrics_after and self.step_after != trainer.global_step:
                step = "an unknown step" if self.step_after is None else f"step {self.step_after}"
                console.print(Text(f"The last validation was at {step}, and training ended at {trainer.global_step}."))
        for index in range(max(len(self.answers_before), len(self.answers_after))):
            console.print(_answer_text(_at(self.answers_before, index), _at(self.answers_after, index)))
        seconds = perf_counter() - self._started
        duration = f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"
        lines = [("Time", f"{duration}, {trainer.global_step} optimizer steps")]
        if adapter is not None:
            lines += [("Adapter", str(adapter.folder)), ("Weights", f"those of {adapter.weights}")]
        lines += [
            ("Curves", f"tensorboard --logdir {logger.log_dir}") for logger in trainer.loggers if is_tensorboard(logger)
        ]
        lines += self._gates(trainer)
        for label, value in lines:
            # A path is there to be copied: no wrapping, and no markup in what a user named.
            console.print(Text(f"{label:<{_INDENT}}{value}"), soft_wrap=True)

    def _gates(self, trainer: Trainer) -> list[tuple[str, str]]:
        """What the fit did to the gates, and the page about it."""
        monitors = [callback.monitor for callback in gate_callbacks(trainer)]
        folder = next((monitor.folder for monitor in monitors if monitor is not None), None)
        if folder is None or not (folder / FILE).is_file():
            return []
        (run,) = read_runs([str(folder)])
        pieces = [piece for sentence in hints(run) for piece in wrap(sentence, max(20, self._console.width - _INDENT))]
        lines = [("" if index else "Gates", piece) for index, piece in enumerate(pieces)]
        if self.report:
            # Drawing is loaded where something is drawn.
            from na_lora_lightning.report.page import write_report

            return [*lines, ("Report", str(write_report([str(folder)])))]
        return [*lines, ("Report", f"na-lora report {folder}")]


def _at(answers: Sequence[EvaluatedAnswer], index: int) -> EvaluatedAnswer | None:
    return answers[index] if index < len(answers) else None


def _metrics_table(first: Measurement, last: Measurement) -> Table:
    table = Table(title="Validation", title_justify="left")
    table.add_column("metric")
    for entry in (first, last):
        step = heading(entry.label, entry.step) if entry.metrics else f"{entry.label} (not measured)"
        table.add_column(step, justify="right")
    table.add_column("change", justify="right")
    before, after = first.metrics, last.metrics
    names = [name for name in _FIRST_METRICS if name in before or name in after]
    names += sorted((set(before) | set(after)) - set(names))
    for name in names:
        values = before.get(name), after.get(name)
        change = "" if values[0] is None or values[1] is None else f"{values[1] - values[0]:+.4g}"
        table.add_row(name, *("" if value is None else f"{value:.4g}" for value in values), change)
    return table


def _answer_text(before: EvaluatedAnswer | None, after: EvaluatedAnswer | None) -> Text:
    known = before or after
    assert known is not None
    text = Text(f"Prompt     {_shortened(known.prompt)}\nReference  {_shortened(known.reference)}\n")
    for label, answer in (("Before", before), ("After", after)):
        if answer is not None:
            style = "green" if answer.correct else "yellow" if answer.found else "red"
            text.append(f"{label:<10} ").append(_shortened(answer.answer) + "\n", style=style)
    return text


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    # Prompts end in the question, so the end is the part to keep.
    return text if len(text) <= _LONGEST_TEXT else f"…{text[1 - _LONGEST_TEXT :]}"
