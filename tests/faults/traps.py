"""Places at which a run kills itself with ``SIGKILL``, set in the child process before the run begins."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from na_lora_lightning.checkpoints import adapter_state as adapters
from na_lora_lightning.checkpoints import files as checkpointing
from na_lora_lightning.checkpoints.run_folders import ContinuedWriter
from na_lora_lightning.checkpoints.run_record import RunRecord
from na_lora_lightning.core.stepping.rows import RowUpdate, _Group
from na_lora_lightning.modules.fit_summary import FitSummaryCallback
from na_lora_lightning.modules.language import NALoRALightningModule

Trap = Callable[[int], None]


def die() -> None:
    """Ends this process as nothing can prevent."""
    os.kill(os.getpid(), signal.SIGKILL)


def _at_call(owner: Any, name: str, after: bool = False) -> Trap:
    """A trap at the n-th call of a function, before or after it does its work."""

    def set_trap(number: int) -> None:
        original, calls = getattr(owner, name), 0

        def trapped(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number and not after:
                die()
            result = original(*arguments, **keywords)
            if calls == number:
                die()
            return result

        setattr(owner, name, trapped)

    return set_trap


def _in_a_checkpoint(owner: Any, name: str) -> Trap:
    """A trap at the n-th call of a function that is made to put a checkpoint into its place."""

    def set_trap(number: int) -> None:
        original, replace, calls, inside = getattr(owner, name), checkpointing.replace_file, 0, False

        def trapped(*arguments: Any) -> Any:
            nonlocal calls
            calls += inside
            if inside and calls == number:
                die()
            return original(*arguments)

        def observed(*arguments: Any) -> None:
            nonlocal inside
            inside = True
            replace(*arguments)
            inside = False

        checkpointing.replace_file = observed
        setattr(owner, name, trapped)

    return set_trap


def _in_half_a_checkpoint(number: int) -> None:
    original, calls = checkpointing.replace_file, 0

    def trapped(path: Path, content: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            with path.with_name(f".{path.name}.partial").open("wb") as file:
                file.write(content[: len(content) // 2])
                file.flush()
            die()
        original(path, content)

    checkpointing.replace_file = trapped


def _between_micro_batches(number: int) -> None:
    """In the second or a later micro-batch of a step, where gradients of earlier ones are lost."""
    original, calls = NALoRALightningModule.training_step, 0

    def trapped(self: Any, batch: Any, batch_idx: int) -> Any:
        nonlocal calls
        calls += batch_idx % self.trainer.accumulate_grad_batches > 0
        if calls == number:
            die()
        return original(self, batch, batch_idx)

    NALoRALightningModule.training_step = trapped


def _between_rows_and_a(number: int) -> None:
    """Each step corrects the rows of B first, and then A."""
    _at_call(_Group, "correct", after=True)(2 * number - 1)


# What only some loggers do.
OF_LOGGERS = {
    "a point of a curve is written": "TensorBoard",
    "rows of a CSV file are written": "CSV",
    "rows of a CSV file are written, the checkpoint is not": "CSV",
    "a CSV file is rewritten": "CSV",
}

# Each with the largest number that falls into a run of every setting that it is used for.
TRAPS: dict[str, tuple[Trap, int]] = {
    "a run leaves its record": (_at_call(RunRecord, "write"), 2),
    "half of a checkpoint is written": (_in_half_a_checkpoint, 4),
    "a checkpoint is written and not in its place": (_in_a_checkpoint(os, "fsync"), 8),
    "a checkpoint is in its place, the folder not on disk": (_in_a_checkpoint(checkpointing, "_sync_folder"), 4),
    "the checkpoint before is about to be removed": (
        _at_call(checkpointing.AtomicCheckpointIO, "remove_checkpoint"),
        2,
    ),
    "between micro-batches": (_between_micro_batches, 8),
    "a training step begins": (_at_call(NALoRALightningModule, "training_step"), 16),
    "the optimizer has stepped, the rows not masked": (_at_call(RowUpdate, "correct"), 6),
    "the rows are masked, the step of A not shortened": (_between_rows_and_a, 6),
    "the rows are masked, the step not counted": (_at_call(RowUpdate, "correct", after=True), 6),
    "validation": (_at_call(NALoRALightningModule, "validation_step"), 6),
    "a point of a curve is written": (_at_call(SummaryWriter, "add_scalar"), 110),
    "rows of a CSV file are written": (_at_call(ContinuedWriter, "save"), 4),
    "rows of a CSV file are written, the checkpoint is not": (_at_call(ContinuedWriter, "save", after=True), 4),
    "a CSV file is rewritten": (_at_call(ContinuedWriter, "_write"), 1),
    "half of the adapter is written": (_at_call(adapters, "_take_place"), 1),
    "the adapter is written": (_at_call(adapters, "_take_place", after=True), 1),
    "the summary is printed": (_at_call(FitSummaryCallback, "_print"), 1),
    "a checkpoint is loaded": (_at_call(checkpointing.AtomicCheckpointIO, "load_checkpoint", after=True), 1),
}
