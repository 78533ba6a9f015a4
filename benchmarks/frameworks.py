"""Useful tokens a second of this package and of what else trains LoRA, side by side in one run.

Each arm is a process of its own, which trains as its framework does (``framework_arms.py``) and stops between two
steps until it is its turn: a machine whose speed drifts slows all arms alike, and each has a peak of memory of its
own. Where memory holds only some of them they take turns in groups, each with transformers' Trainer, by which all are
divided. The first round warms up and is not counted.

Run::

    OMP_NUM_THREADS=1 python benchmarks/frameworks.py --model .cache/quickstart/SmolLM2-135M-Instruct

writes ``benchmarks/results/frameworks.json``: a row for each workload and arm. A model's folder without weights is
given random ones.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from framework_arms import ARMS, WORKLOADS
from lora_arms import where
from transformers import AutoConfig, AutoModelForCausalLM

REFERENCE = "trainer"
RESULTS = Path(__file__).parent / "results" / "frameworks.json"


class Arm:
    """A training in a process of its own, held between two steps."""

    def __init__(self, name: str, workload: str, options: argparse.Namespace) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # open as long as the process
        script = Path(__file__).with_name("framework_arms.py")
        on = ["--model", options.model, "--device", options.device, "--dtype", options.dtype]
        self._process = subprocess.Popen(
            [sys.executable, script, "--arm", name, "--workload", workload, *on],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.rounds: list[dict[str, Any]] = []

    def wait(self) -> None:
        """Until the first step can begin."""
        self._answer()

    def run(self, steps: int) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        self.rounds.append(self._answer())

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"The arm {self.name} ended:\n{self._log.read()[-3000:]}")
        return json.loads(line)


def compare(workload: str, names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs the arms in turn; the first is what the others are divided by."""
    rounds, steps = options.rounds, options.steps
    arms: list[Arm] = []
    try:
        arms += [Arm(name, workload, options) for name in names]
        for arm in list(arms):
            try:
                arm.wait()
            except RuntimeError as error:
                if arm.name == REFERENCE:
                    raise
                print(error)
                arms.remove(arm)
        for turn in range(rounds + 1):
            shift = turn % len(arms)
            for arm in arms[shift:] + arms[:shift]:
                arm.run(steps)
    finally:
        for arm in arms:
            arm.stop()

    def median(arm: Arm, key: str, by: str) -> float:
        return statistics.median(each[key] / each[by] for each in arm.rounds[1:])

    return [
        {
            "workload": workload,
            "arm": arm.name,
            "step_seconds": median(arm, "seconds", "steps"),
            "targets_per_second": median(arm, "targets", "seconds"),
            "tokens_per_second": median(arm, "tokens", "seconds"),
            "ratio": median(arm, "tokens", "seconds") / median(arms[0], "tokens", "seconds"),
            "peak_gib": arm.rounds[-1]["peak_bytes"] / 2**30,
            "rounds": rounds,
            "steps": steps,
        }
        for arm in arms
    ]


def with_weights(model: str, folder: str) -> str:
    """The model; where its folder has no weights, a copy of it with random ones in another folder."""
    if not os.path.isdir(model) or any(Path(model).glob("*.safetensors")):
        return model
    shutil.copytree(model, folder, dirs_exist_ok=True)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder of a model, or its name on the hub")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2, help="steps of an arm in a round")
    parser.add_argument("--together", type=int, default=4, help="processes that hold a model at the same time")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base model")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    began = time.perf_counter()
    place = tempfile.TemporaryDirectory()
    options.model = with_weights(options.model, place.name)
    names = [name for name in options.arms if find_spec("trl") or not name.startswith("trl")]
    if names != options.arms:
        print("trl is not installed, so its arms are left out: pip install trl")
    rows: list[dict[str, Any]] = []
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for workload in options.workloads:
        print(f"{workload}: batches of 8 records of {WORKLOADS[workload]}; {torch.get_num_threads()} threads")
        others = [name for name in names if name != REFERENCE]
        new = []
        for first in range(0, len(others), options.together - 1):
            arms = [REFERENCE, *others[first : first + options.together - 1]]
            measured = compare(workload, arms, options)
            new += measured if first == 0 else measured[1:]
        rows += new
        for row in new:
            print(
                f"  {ARMS[row['arm']]:52} {row['step_seconds']:6.3f} s  {row['targets_per_second']:7.1f} targets/s"
                f"  {row['tokens_per_second']:7.1f} tokens/s  × {row['ratio']:4.2f}  {row['peak_gib']:5.2f} GiB"
            )
        # What is measured by now is not lost if a later workload ends in an error.
        options.output.write_text(json.dumps({"where": where(options.device), "rows": rows}, indent=1))
    print(f"took {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
