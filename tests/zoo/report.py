"""Checks every model type of all mappings and writes the table in the documentation.

From ``tests``: ``python -m zoo.report [--types a b] [--mapping causal-lm] [--jobs 2] [--output ../docs/model_zoo.md]``.
Each type has a process of its own, so that none can disturb another or stop the whole.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from zoo.tables import Outcome, document, share_right, summary, with_blocks
from zoo.tiny_models import Mapping, NotBuildable, build, model_types

SECONDS = 120.0
TARGET = 0.97


@dataclass
class Job:
    """A type that is being checked in another process."""

    mapping: Mapping
    model_type: str
    process: ForkServerProcess
    answer: Connection
    deadline: float

    def outcome(self) -> Outcome:
        """What came of it, once it has answered, ended or run out of time."""
        try:
            if self.answer.poll():
                found: Outcome = self.answer.recv()
                return found
        except EOFError:
            self.process.join()
        if self.process.is_alive():
            self.process.kill()
            return Outcome(self.mapping, self.model_type, error=f"no answer within {SECONDS:.0f} s")
        return Outcome(self.mapping, self.model_type, error=f"the process ended with status {self.process.exitcode}")


def examine(mapping: Mapping, model_type: str) -> Outcome:
    """Builds and checks one type."""
    from zoo.check import check

    try:
        return Outcome(mapping, model_type, verdict=check(build(mapping, model_type)))
    except NotBuildable as reason:
        return Outcome(mapping, model_type, not_buildable=str(reason))
    except Exception as error:
        return Outcome(mapping, model_type, error=f"{type(error).__name__}: {error}")


def work(mapping: Mapping, model_type: str, answer: Connection) -> None:
    """What a process does."""
    import torch

    torch.set_num_threads(1)
    answer.send(examine(mapping, model_type))
    answer.close()


def start(context: ForkServerContext, mapping: Mapping, model_type: str) -> Job:
    """Starts a process for one type."""
    answer, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(mapping, model_type, theirs), daemon=True)
    process.start()
    theirs.close()
    return Job(mapping, model_type, process, answer, time.monotonic() + SECONDS)


def examine_all(wanted: list[tuple[Mapping, str]], jobs: int) -> Iterator[Outcome]:
    """Checks types in ``jobs`` processes at a time; outcomes come in no order."""
    context = multiprocessing.get_context("forkserver")
    # Imports are made once, and each process is a copy; the server takes the path from the environment alone.
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    context.set_forkserver_preload(["zoo.check"])
    waiting, running = list(reversed(wanted)), list[Job]()
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(start(context, *waiting.pop()))
        now = time.monotonic()
        ready = wait([job.answer for job in running], timeout=max(0.0, min(job.deadline for job in running) - now))
        for job in list(running):
            if job.answer in ready or time.monotonic() > job.deadline:
                running.remove(job)
                yield job.outcome()
                job.answer.close()
                job.process.join()


def parse(arguments: list[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m zoo.report", description=__doc__.split("\n")[0])
    parser.add_argument("--types", nargs="+", help="model types; all when left out")
    parser.add_argument("--mapping", choices=get_args(Mapping), action="append", help="mapping; all when left out")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--output", type=Path, help="where to write the tables; those of other mappings stay")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Runs the command; 1 when a type is red or too few are right."""
    options = parse(arguments)
    mappings: list[Mapping] = options.mapping or list(get_args(Mapping))
    wanted = [(m, t) for m in mappings for t in model_types(m) if not options.types or t in options.types]
    console = Console()
    outcomes = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("model types", total=len(wanted))
        for outcome in examine_all(wanted, options.jobs):
            outcomes.append(outcome)
            progress.update(task, advance=1, description=outcome.model_type)
            if outcome.is_red:
                console.print(
                    f"[red]{outcome.mapping} {outcome.model_type}[/red]: {escape(outcome.note)}",
                    highlight=False,
                    soft_wrap=True,
                )
    order: list[tuple[str, str]] = [*wanted]
    outcomes.sort(key=lambda outcome: order.index((outcome.mapping, outcome.model_type)))
    console.print(summary(outcomes))
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        before = options.output.read_text(encoding="utf-8") if options.output.exists() else ""
        options.output.write_text(document(outcomes, before), encoding="utf-8")
    red = any(outcome.is_red for outcome in outcomes)
    low = not options.types and any(
        share_right(with_blocks([outcome for outcome in outcomes if outcome.mapping == mapping])) < TARGET
        for mapping in mappings
    )
    return int(red or low)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
