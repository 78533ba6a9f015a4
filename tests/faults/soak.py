"""Trains for a long time, and many times over, and watches memory and hooks.

Run it in ``tests``: ``python -m faults.soak --output ../docs/faults.md``.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from module_helpers import Batches, quiet_trainer, saved_model, some_batches

from na_lora_lightning import GateImportanceCallback, StepScaleCallback
from na_lora_lightning.arguments import AdapterOptions, LoRAOptions, ScheduleOptions
from na_lora_lightning.checkpoints.callbacks import ResumableCurves, RunCheckpoint
from na_lora_lightning.checkpoints.files import AtomicCheckpointIO
from na_lora_lightning.modules.language import NALoRALightningModule

_MARKS = ("<!-- soak -->", "<!-- /soak -->")
_SAMPLES = 20


def resident_bytes() -> int:
    """Memory of this process that is in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def hooks_of(module: torch.nn.Module, optimizers: list[Any]) -> int:
    """Hooks on a module, its parameters and optimizers."""
    count = 0
    for inner in module.modules():
        for store in (inner._forward_hooks, inner._forward_pre_hooks, inner._backward_hooks, inner._backward_pre_hooks):
            count += len(store)
    for parameter in module.parameters():
        count += len(parameter._backward_hooks or {})
    for optimizer in optimizers:
        count += len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
    return count


class Memory(Callback):
    """Samples the memory at even distances."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.samples: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        if trainer.global_step % self.every == 0:
            gc.collect()
            self.samples.append(resident_bytes())


def make_module(folder: Path) -> NALoRALightningModule:
    """A tiny model with dropout."""
    return NALoRALightningModule(
        saved_model(folder / "base"),
        lora=LoRAOptions(r=2, alpha=4, dropout=0.1),
        schedule=ScheduleOptions(name="constant", warmup_fraction=0.0),
        adapter=AdapterOptions(write="never"),
    )


def make_trainer(folder: Path, epochs: int, *more: Callback) -> Trainer:
    """A trainer with both mechanisms, curves and checkpoints."""
    return quiet_trainer(
        folder,
        max_epochs=epochs,
        enable_checkpointing=True,
        log_every_n_steps=10,
        logger=TensorBoardLogger(folder / "logs"),
        plugins=[AtomicCheckpointIO()],
        callbacks=[
            GateImportanceCallback(),
            StepScaleCallback(),
            ResumableCurves(),
            RunCheckpoint(every_n_steps=100),
            *more,
        ],
    )


def main() -> int:
    """Soaks; the exit status is 1 if memory or hooks grew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--fits", type=int, default=20)
    parser.add_argument("--output", type=Path, help="document whose figures are replaced")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    batches = Batches(some_batches(20))
    memory = Memory(options.steps // _SAMPLES)
    module = make_module(folder)
    trainer = make_trainer(folder, options.steps // 20, memory)
    trainer.fit(module, batches)
    warm = memory.samples[len(memory.samples) // 4]
    growth = max(memory.samples[len(memory.samples) // 4 :]) / warm - 1
    left = [hooks_of(module, trainer.optimizers)]
    objects = []
    for _ in range(options.fits):
        trainer = make_trainer(folder, 1)
        trainer.fit(module, batches)
        left.append(hooks_of(module, trainer.optimizers))
        del trainer
        gc.collect()
        objects.append(len(gc.get_objects()))
    # The first fits fill caches.
    per_fit = (objects[-1] - objects[len(objects) // 2]) / (len(objects) - 1 - len(objects) // 2)
    text = (
        f"{options.steps} optimizer steps with both mechanisms, curves and a checkpoint every 100 steps: resident "
        f"memory {warm / 2**20:.1f} MiB after a quarter of them, and at most {100 * growth:+.2f} % of that later. "
        f"{options.fits} more fits of the same module: {max(left)} hooks left on model, parameters and optimizer after "
        f"any of them, and {per_fit:+.0f} Python objects a fit in the second half."
    )
    print(text)
    if options.output is not None:
        document = options.output.read_text(encoding="utf-8")
        pattern = re.compile(f"{re.escape(_MARKS[0])}.*{re.escape(_MARKS[1])}", re.DOTALL)
        options.output.write_text(
            pattern.sub(lambda _: f"{_MARKS[0]}\n{text}\n{_MARKS[1]}", document), encoding="utf-8"
        )
    return int(growth > 0.02 or max(left) > 0)


if __name__ == "__main__":
    sys.exit(main())
