"""The last stage: LoRA with or without nonlinearity awareness, through the package's own module, data and callbacks."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from datasets import disable_progress_bars
from digits import KINDS, Question, read_questions
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from settings import Settings
from torch.optim import AdamW

from na_lora_lightning import (
    GateImportanceCallback,
    NALoRALightningModule,
    StepScaleCallback,
    VisionInstructionDataModule,
)
from na_lora_lightning.arguments import AdapterOptions, EvaluationOptions, LoRAOptions, ScheduleOptions

ANSWERS = "answers.json"
METHODS = ("na", "lora")
# Sums have at most two digits, and one token ends an answer.
_LONGEST_ANSWER = 3
_EVALUATION_BATCH = 50


def make_data(model: Path, data: Path, settings: Settings, seed: int) -> VisionInstructionDataModule:
    """The questions as a data module; what is predicted are the held-out ones.

    Args:
        model: Folder with the processor.
        data: Folder with the records.
        settings: Size of a batch.
        seed: Seed of the order of the training questions.
    """
    return VisionInstructionDataModule(
        str(model),
        train=str(data / "train.jsonl"),
        predict=str(data / "held_out.jsonl"),
        batch_size=settings.batch_size,
        validation_batch_size=_EVALUATION_BATCH,
        max_length=64,
        num_workers=0,
        seed=seed,
    )


def make_module(model: Path, folder: Path, settings: Settings) -> NALoRALightningModule:
    """The model with LoRA on every linear layer of the language model, the vision tower and the projector.

    Args:
        model: Folder of the model.
        folder: Where the adapter is written to.
        settings: Rank and learning rate.
    """
    return NALoRALightningModule(
        str(model),
        lora=LoRAOptions(r=settings.rank, alpha=2 * settings.rank, parts=["language", "vision", "projector"]),
        optimizer=lambda parameters: AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0),
        schedule=ScheduleOptions(name="cosine", warmup_fraction=0.1),
        evaluation=EvaluationOptions(generate=True, max_new_tokens=_LONGEST_ANSWER),
        adapter=AdapterOptions(folder=str(folder)),
    )


def make_callbacks(method: str, settings: Settings) -> list[Callback]:
    """Both mechanisms of NA-LoRA in the plain reading, with which the README's table was measured, or none of them."""
    if method == "lora":
        return []
    importance = GateImportanceCallback(
        keep_fraction=settings.keep_fraction,
        criterion="selection_derivative",
        warmup_steps=10,
        refresh_every=10,
        histogram_every_n_steps=20,
    )
    return [importance, StepScaleCallback(granularity="activation", normalize=False, matrix_a_factor=1.0)]


def answer_untrained(folder: Path, model: Path, data: Path, settings: Settings) -> str:
    """Answer the held-out questions with the model as it is before LoRA.

    Args:
        folder: Existing folder that the answers are written to.
        model: Folder of the model.
        data: Folder with the records.
        settings: Size of a batch.

    Returns:
        The accuracy, in words.
    """
    _quiet()
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, **_NO_BARS)
    answers = _predict(trainer, make_module(model, folder / "adapter", settings), make_data(model, data, settings, 0))
    return _keep(folder, answers, data)


def fine_tune(folder: Path, model: Path, data: Path, settings: Settings, method: str, seed: int) -> str:
    """Fine-tune, answer the held-out questions, and write adapter, curves and answers.

    Args:
        folder: Existing folder that all of it is written to.
        model: Folder of the model.
        data: Folder with the records.
        settings: Length of the training, and the learning rate.
        method: ``"na"`` or ``"lora"``.
        seed: Seed of LoRA's initial weights and of the order of the questions.

    Returns:
        Time and accuracy, in words.
    """
    _quiet()
    seed_everything(seed, verbose=False)
    logger = TensorBoardLogger(save_dir=str(folder), name="", version="curves", default_hp_metric=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=settings.epochs,
        callbacks=make_callbacks(method, settings),
        logger=logger,
        log_every_n_steps=settings.log_every,
        enable_checkpointing=False,
        enable_progress_bar=True,
        enable_model_summary=False,
    )
    module, datamodule = make_module(model, folder / "adapter", settings), make_data(model, data, settings, seed)
    started = perf_counter()
    trainer.fit(module, datamodule)
    seconds = perf_counter() - started
    answers = _predict(trainer, module, datamodule)
    questions = read_questions(data / "held_out.jsonl")
    values = {f"held_out_accuracy/{kind}": value for kind, value in accuracies(questions, answers).items()}
    logger.log_metrics(values, step=trainer.global_step)
    logger.finalize("success")
    return f"{trainer.global_step} steps in {seconds:.0f} s, {_keep(folder, answers, data)}"


def accuracies(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Fraction of right answers of each kind of question, and of all.

    Args:
        questions: The questions.
        answers: An answer to each; surrounding white space does not count.
    """
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for question, answer in zip(questions, answers, strict=True):
        right[question.kind].append(answer.strip() == question.completion)
    by_kind = {kind: sum(values) / len(values) for kind, values in right.items() if values}
    everything = [value for values in right.values() for value in values]
    return {**by_kind, "all": sum(everything) / len(everything)}


def read_answers(folder: Path) -> list[str]:
    """Read the answers that one of the functions above has left in a folder."""
    answers: list[str] = json.loads((folder / ANSWERS).read_text(encoding="utf-8"))
    return answers


_NO_BARS: Mapping[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}


def _predict(trainer: Trainer, module: NALoRALightningModule, data: VisionInstructionDataModule) -> list[str]:
    batches: Any = trainer.predict(module, datamodule=data)
    return [answer for batch in batches for answer in batch]


def _keep(folder: Path, answers: list[str], data: Path) -> str:
    (folder / ANSWERS).write_text(json.dumps(answers), encoding="utf-8")
    right = accuracies(read_questions(data / "held_out.jsonl"), answers)["all"]
    return f"{100 * right:.1f} % of the held-out questions right"


def _quiet() -> None:
    """Leaves out what Lightning says about machines and loaders that this example does not use."""
    disable_progress_bars()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".isinstance.treespec, LeafSpec.. is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
