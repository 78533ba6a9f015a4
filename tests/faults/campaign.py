"""Kills ``na-lora fit`` again and again, goes on with ``--ckpt_path last``, and compares what is left bitwise.

Run it in ``tests``: ``python -m faults.campaign --kills 100 --output ../docs/faults.md``.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from faults.runs import LOGGERS, SETTINGS, Remains, Setting, Workplace, differences, fit, remains
from faults.traps import OF_LOGGERS, TRAPS

_MARKS = ("<!-- kills -->", "<!-- /kills -->")
_TIMES = "a moment drawn at random"
# Every setting with every logger, the loggers in turn.
_ALL = [replace(setting, name=f"{setting.name}, {logger}", logger=logger) for setting in SETTINGS for logger in LOGGERS]
_REAL = "a moment drawn at random, in a process started by the shell's command"


@dataclass
class Tally:
    """What fell where.

    Attributes:
        kills: By place and logger.
        lost: What differed, by place of the last kill.
        runs: Interrupted runs that were brought to their end.
        starts_over: Kills before the first checkpoint.
    """

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    lost: list[tuple[str, str]] = field(default_factory=list)
    runs: int = 0
    starts_over: int = 0

    def add(self, other: Tally) -> None:
        """Takes what another has counted."""
        self.kills += other.kills
        self.lost += other.lost
        self.runs += other.runs
        self.starts_over += other.starts_over


def main() -> int:
    """Runs the campaign; the exit status is the number of differences, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="kills at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="document whose table of kills is replaced")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    place = Workplace(folder)
    wholes, durations = {}, {}
    for setting in _ALL:
        run = folder / f"whole-{len(wholes)}"
        # The first fit of a process also fills caches.
        for _ in range(2):
            shutil.rmtree(run, ignore_errors=True)
            status, durations[setting.name] = fit(place.arguments(run, setting), folder / "whole.log")
            assert status == 0, (folder / "whole.log").read_text()
        wholes[setting.name] = remains(run)
    tally = Tally()
    with suppress(KeyboardInterrupt):
        # Ctrl-C ends the campaign after the runs that are complete, and their kills are reported.
        while sum(tally.kills.values()) < options.kills:
            setting, own = _ALL[tally.runs % len(_ALL)], Tally()
            run = folder / f"run-{tally.runs}"
            interrupt(place, run, setting, durations[setting.name], draw, own)
            finish(place, run, setting, wholes[setting.name], own)
            tally.add(own)
    # One for each setting, and each logger.
    for setting in _ALL[:: len(LOGGERS) + 1]:
        run = folder / f"shell-{tally.runs}"
        interrupt_from_outside(place, run, setting, draw, tally)
        finish(place, run, setting, wholes[setting.name], tally)
    table = report(tally, time.monotonic() - began)
    print(table)
    if options.output is not None:
        text = options.output.read_text(encoding="utf-8")
        pattern = re.compile(f"{re.escape(_MARKS[0])}.*{re.escape(_MARKS[1])}", re.DOTALL)
        options.output.write_text(pattern.sub(lambda _: f"{_MARKS[0]}\n{table}\n{_MARKS[1]}", text), encoding="utf-8")
    if not tally.lost:
        shutil.rmtree(folder)
    return min(1, len(tally.lost))


def interrupt(
    place: Workplace, run: Path, setting: Setting, duration: float, draw: random.Random, tally: Tally
) -> None:
    """Kills one run, and its continuations, one to three times."""
    log = run.with_suffix(".log")
    for kill in range(draw.choice((1, 1, 2, 3))):
        # Those that only a resumed, or only an accumulating run meets.
        usable = [name for name in TRAPS if kill or name != "a checkpoint is loaded"]
        usable = [name for name in usable if OF_LOGGERS.get(name, setting.logger) == setting.logger]
        if "accumulation" not in setting.name:
            usable.remove("between micro-batches")
        where = draw.choice([*usable, _TIMES, _TIMES, _TIMES])
        arguments = place.arguments(run, setting, "--ckpt_path=last")
        if where == _TIMES:
            status, _ = fit(arguments, log, kill_after=draw.uniform(0.0, duration))
        else:
            trap, most = TRAPS[where]
            number = draw.randint(1, most)
            status, _ = fit(arguments, log, trap=lambda trap=trap, number=number: trap(number))
        if status == 0:
            # It came to its end first.
            return
        assert status == -signal.SIGKILL, f"{where}: {status}\n{log.read_text()[-3000:]}"
        tally.kills[where, setting.logger] += 1
        tally.starts_over += not list(run.rglob("*.ckpt"))


def interrupt_from_outside(place: Workplace, run: Path, setting: Setting, draw: random.Random, tally: Tally) -> None:
    """Kills a run that nothing prepared: the command itself, imports and all."""
    command = [sys.executable, "-m", "na_lora_lightning", *place.arguments(run, setting, "--ckpt_path=last")]
    with run.with_suffix(".log").open("wb") as log:
        # As many threads as the runs that it is compared with: sums in another order round otherwise.
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        # Until it trains, then a little longer.
        while process.poll() is None and not list(run.rglob("*.ckpt")):
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, 0.5))
        process.kill()
        if process.wait() == -signal.SIGKILL:
            tally.kills[_REAL, setting.logger] += 1


def finish(place: Workplace, run: Path, setting: Setting, whole: Remains, tally: Tally) -> None:
    """Lets the run come to its end, and compares."""
    log = run.with_suffix(".log")
    status, _ = fit(place.arguments(run, setting, "--ckpt_path=last"), log)
    assert status == 0, log.read_text()[-3000:]
    tally.runs += 1
    found = differences(whole, remains(run))
    stray = [path.name for path in run.rglob("*") if ".partial" in path.name]
    if len(list(run.rglob("*.ckpt"))) > 2:
        stray.append("more checkpoints than are kept")
    tally.lost += [(run.name, difference) for difference in [*found, *stray]]
    print(run.name, "equal" if not found and not stray else f"DIFFERS: {[*found, *stray][:5]}", flush=True)
    if not found:
        shutil.rmtree(run)


def report(tally: Tally, seconds: float) -> str:
    """A Markdown table of the kills by place and logger."""
    total = sum(tally.kills.values())
    places: Counter[str] = Counter()
    for (where, _), count in tally.kills.items():
        places[where] += count
    lines = [f"| the kill fell while | kills | {' | '.join(LOGGERS)} |", "|---|---|" + "---|" * len(LOGGERS)]
    rows = [(where, count, [tally.kills[where, logger] for logger in LOGGERS]) for where, count in places.most_common()]
    rows.append(("all", total, [sum(row[2][index] for row in rows) for index in range(len(LOGGERS))]))
    lines += [f"| {where} | {count} | {' | '.join(map(str, by_logger))} |" for where, count, by_logger in rows]
    verdict = (
        "every one of them bitwise equal to the uninterrupted run, with nothing lost"
        if not tally.lost
        else f"with {len(tally.lost)} differences: {tally.lost[:3]}"
    )
    return "\n".join(
        [
            *lines,
            "",
            f"{total} kills with `SIGKILL` in {tally.runs} runs, {tally.starts_over} before the first checkpoint; "
            f"after `--ckpt_path last` {verdict}. {seconds / 60:.0f} minutes on one core.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
