"""Histories of runs that never ran, with numbers that a test knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from na_lora_lightning.history import HistoryWriter

GROUPS = ("gate_responsiveness", "selection_misalignment", "selection_share", "gate_regime_suppressed")


def write_run(
    folder: Path,
    layers: int = 6,
    steps: int = 40,
    every: int = 10,
    standing_out: int | None = 4,
    ended: bool = True,
    **options: Any,
) -> Path:
    """Writes a history: layer ``standing_out`` moves its selection 5 times as much as the others do."""
    writer = HistoryWriter(folder)
    sites = [{"label": f"layer_{n:02d}", "channels": 100, "layer": n, "activation": "silu"} for n in range(layers)]
    start: dict[str, Any] = {
        "in_force": "NA-LoRA: 6 silu gates, 600 channels; rows of the least responsive 10 % (60) held from step 11.",
        "options": {"model": "base", "data.train": "train.jsonl", "optimizer.init_args.lr": 0.001, **options},
        "parameters": {"trainable": 1234, "total": 123_456},
        "mechanisms": {"importance": {}},
        "planned_steps": steps,
        "sites": sites,
    }
    writer.write("start", 0, **start)
    sample = {"prompt": "1+1?", "reference": "2", "answer": "three", "correct": False}
    writer.write("validation", 0, metrics={"validation/loss": 2.0, "validation/exact_match": 0.25}, samples=[sample])
    generator = np.random.default_rng(0)
    for step in range(every, steps + 1, every):
        gates = {group: (0.5 + 0.01 * generator.random(layers)).tolist() for group in GROUPS}
        moved = np.full(layers, 0.01 * step / steps)
        if standing_out is not None:
            moved[standing_out] *= 5
        gates["selection_misalignment"] = moved.tolist()
        gates["gate_mask_density"] = [0.9 if step > every else 1.0] * layers
        writer.write("step", step, gates=gates, metrics={"train/loss": 2.0 - step / steps, "learning_rate": 0.001})
    writer.write("channels", steps, since=0, below=0.01, quiet=[0, 3] + [0] * (layers - 2))
    answer = {**sample, "answer": "2", "correct": True}
    writer.write(
        "validation", steps, metrics={"validation/loss": 1.5, "validation/exact_match": 0.75}, samples=[answer]
    )
    if ended:
        writer.write("end", steps, outcome="ended")
    return folder
