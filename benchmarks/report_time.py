"""How long ``na-lora report`` takes for ten runs of 10,000 steps.

Usage: python benchmarks/report_time.py [--every 10]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from na_lora_lightning.history import HistoryWriter

RUNS, STEPS, LAYERS = 10, 10_000, 30
GROUPS = (
    "gate_responsiveness",
    "selection_misalignment",
    "selection_share",
    "gate_regime_suppressed",
    "gate_mask_churn",
)


def write_run(folder: Path, every: int) -> str:
    """Writes the history of a run of 30 layers that is logged every so many steps."""
    writer, random = HistoryWriter(folder), np.random.default_rng(0)
    sites = [{"label": f"layer_{layer:02d}", "channels": 1536} for layer in range(LAYERS)]
    writer.write("start", 0, sites=sites, options={"lr": 0.001})
    for step in range(every, STEPS + 1, every):
        gates = {group: random.random(LAYERS).tolist() for group in GROUPS}
        writer.write("step", step, gates=gates, metrics={"train/loss": 1 / step})
    return str(folder)


def main() -> None:
    """Prints the size of the histories, and the seconds that the report takes, the start of Python included."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=10, help="steps between two logged ones (default: %(default)s)")
    every = parser.parse_args().every
    with tempfile.TemporaryDirectory() as place:
        runs = [write_run(Path(place, f"run{number}"), every) for number in range(RUNS)]
        size = sum(Path(run, "history.jsonl").stat().st_size for run in runs)
        page = Path(place, "report.html")
        began = time.perf_counter()
        command = [sys.executable, "-m", "na_lora_lightning", "report", *runs, "--output", str(page)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - began
        print(f"{size / 1e6:.1f} MB of histories: {seconds:.1f} s, a page of {page.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
