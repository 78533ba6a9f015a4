"""Step time of NA-LoRA divided by that of plain PEFT LoRA, both under Lightning, side by side in one run.

Both arms train the same model on the same batches. They alternate in short blocks, each block a ``Trainer.fit`` of a
few steps, so that a machine whose speed drifts slows both alike. A step is timed from the start of one batch to the
start of the next, with everything that happens between: data, forward, backward, optimizer, callbacks, logging.
A third arm, plain LoRA again, shows how far a ratio is off 1 by noise alone.

Run::

    python benchmarks/step_time.py --model .cache/quickstart/SmolLM2-135M-Instruct

Each run appends one line per ratio to ``benchmarks/step_time.csv``.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import logging
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import peft
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from na_lora_lightning import GateImportanceCallback, NALoRALightningModule, StepScaleCallback

RESULTS = Path(__file__).with_suffix(".csv")
COLUMNS = (
    "date",
    "device",
    "model",
    "tokens",
    "arm",
    "steps",
    "median_seconds",
    "median_ratio",
    "mean_ratio",
    "torch",
    "lightning",
    "peft",
    "python",
)


class StepTimer(Callback):
    """Wall time from one batch's start to the next one's; the first step of a block is not counted."""

    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.starts.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.starts[1:], self.starts[2:], strict=False)]


def make_batches(count: int, rows: int, length: int, targets: int, vocabulary: int) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        tokens = torch.randint(5, vocabulary, (rows, length), generator=generator)
        labels = tokens.clone()
        labels[:, : length - targets] = -100
        batches.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels})
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def run_block(module: NALoRALightningModule, callbacks: list[Callback], loader: DataLoader, steps: int) -> list[float]:
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=steps,
            devices=1,
            callbacks=[timer, *callbacks],
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=10,
        )
        trainer.fit(module, loader)
    return timer.seconds()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a model, or its name on the hub")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--targets", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12, help="steps of a block")
    parser.add_argument("--rounds", type=int, default=4, help="blocks of each arm")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    def callbacks_of(arm: str) -> list[Callback]:
        if arm.startswith("vanilla"):
            return []
        # No warm-up: every timed step masks and scales.
        return [GateImportanceCallback(warmup_steps=0, refresh_every=10), StepScaleCallback()]

    arms = ["vanilla", "na_lora", "vanilla_again"]
    modules = {}
    for arm in arms:
        seed_everything(0, verbose=False)
        modules[arm] = NALoRALightningModule(options.model, adapter={"write": "never"})  # type: ignore[arg-type]
        modules[arm].configure_model()
    vocabulary = modules["vanilla"].model.config.vocab_size
    loader = make_batches(options.steps, options.rows, options.length, options.targets, vocabulary)
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for round_index in range(options.rounds):
        order = arms[round_index % 3 :] + arms[: round_index % 3]
        for arm in order:
            seconds[arm] += run_block(modules[arm], callbacks_of(arm), loader, options.steps)
    median = {arm: statistics.median(values) for arm, values in seconds.items()}
    mean = {arm: statistics.fmean(values) for arm, values in seconds.items()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}; {options.rows}×{options.length} tokens a step; {len(seconds['vanilla'])} timed steps an arm")
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        for arm in arms[1:]:
            ratio, mean_ratio = median[arm] / median["vanilla"], mean[arm] / mean["vanilla"]
            print(f"{arm} ÷ vanilla: median {ratio:.3f}, mean {mean_ratio:.3f} ({median[arm]:.3f} s a step)")
            writer.writerow(
                [
                    datetime.date.today().isoformat(),
                    device,
                    Path(options.model).name,
                    options.rows * options.length,
                    arm,
                    len(seconds[arm]),
                    f"{median[arm]:.4f}",
                    f"{ratio:.4f}",
                    f"{mean_ratio:.4f}",
                    torch.__version__,
                    pl.__version__,
                    peft.__version__,
                    platform.python_version(),
                ]
            )


if __name__ == "__main__":
    main()
