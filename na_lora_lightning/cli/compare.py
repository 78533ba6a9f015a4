"""``na-lora compare``: ways to fine-tune, side by side on one's own data."""

from __future__ import annotations

import logging
import subprocess
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from na_lora_lightning.cli.errors import CommandParser
from na_lora_lightning.errors import ConfigurationError

if TYPE_CHECKING:
    from na_lora_lightning.compare.cells import Fit
    from na_lora_lightning.compare.plan import Options, Plan

_DESCRIPTION = """\
Train the same data in several ways (arms), each at several learning rates and seeds, and write a page that says which
differences are more than chance. Rates are chosen by validation loss, scores are of the test data. A comparison that is
stopped goes on where it was, and the same command in a second terminal, or on another machine with the same --storage,
joins it.

arms: {arms}
A file of one's own has a name and its options in each line, by the addresses of 'na-lora fit':
  half: {{gate_importance.keep_fraction: 0.5, step_scale: false}}
Options that are not below, such as --data.batch_size 4, go to every fit.
"""


def options_parser() -> CommandParser:
    """The parser of its options."""
    from na_lora_lightning.compare.plan import ARMS

    parser = CommandParser(
        prog="na-lora compare",
        description=_DESCRIPTION.format(arms=", ".join(ARMS)),
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(name: str, description: str, **options: Any) -> None:
        parser.add_argument(name, help=description, **options)

    add("--config", "configuration of 'na-lora fit'; several go over one another", action="append", metavar="FILE")
    add("--arms", "names and files, with commas; all are compared with the first", default="lora,na_lora")
    add("--tasks", "file of tasks: a name and what it changes in the configuration (default: one task)")
    add("--rates", "learning rates of every arm (default: %(default)s)", default="2e-4,5e-4,1e-3", metavar="RATES")
    add("--seeds", "number of seeds (default: %(default)s)", type=int, default=3)
    add(
        "--extend",
        "most rates added where the best is at the edge (default: %(default)s)",
        type=int,
        default=2,
    )
    add(
        "--prune",
        "leave out rates that are PERCENT above the best at the first seed",
        type=float,
        metavar="PERCENT",
    )
    add("--other-text", "text on which forgetting is measured (default: a short one that ships)", metavar="FILE")
    add("--last-layers", "train the last K blocks alone, on inputs that are computed once", type=int, metavar="K")
    add(
        "--output",
        "folder of the page and the trials (default: %(default)s)",
        default="comparison",
        metavar="FOLDER",
    )
    add("--storage", "where Optuna keeps the trials (default: sqlite:///OUTPUT/comparison.db)", metavar="URL")
    add("--name", "name of the comparison in the storage (default: %(default)s)", default="comparison")
    add("--minutes", "begin no further fit after that time", type=float)
    add("--workers", "processes that train at once (default: %(default)s)", type=int, default=1)
    add("--margin", "per cent within which arms are called equal (default: %(default)s)", type=float, default=0.5)
    add("--retake", "train again what is marked as running, where a storage has no heartbeat", action="store_true")
    add("--show", "write the page of what there is, and train nothing", action="store_true")
    return parser


def main(arguments: list[str]) -> int:
    """Runs ``na-lora compare``.

    Args:
        arguments: What follows ``compare`` on the command line.

    Returns:
        0, also where the time was over before all cells were done.

    Raises:
        NALoRAError: Something that the user can correct.
    """
    parser = options_parser()
    options, changes = parser.parse_known_args(arguments)
    try:
        import optuna  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            f"na-lora compare needs the package {error.name!r}; run pip install 'na-lora-lightning[compare]'."
        ) from error
    from na_lora_lightning.compare.cells import CellScorer
    from na_lora_lightning.compare.opening import open_storage
    from na_lora_lightning.compare.page import write_page
    from na_lora_lightning.compare.storage import Comparison

    url = options.storage or f"sqlite:///{Path(options.output).expanduser()}/comparison.db"
    if options.show:
        comparison = Comparison.there(open_storage(url), options.name)
    else:
        plan = _plan(options, changes)
        storage = open_storage(url)
        if not Comparison.is_known(storage, options.name, plan):
            _require_fits(plan)
        comparison = Comparison.begin(storage, options.name, plan)
        if options.retake:
            comparison.retake()
        if options.workers > 1:
            _in_processes(arguments, options)
        else:
            scorer = CellScorer(comparison.plan, make_fit, Path(options.output).expanduser() / "inputs")
            with _quietly():
                comparison.work(scorer.score, options.minutes and 60 * options.minutes, _say)
        if options.workers == 0:
            return 0
    counts = ", ".join(f"{number} {state}" for state, number in comparison.count().items() if number)
    for (task, arm), reason in comparison.failures().items():
        if not comparison.scored():
            raise ConfigurationError(f"nothing could be trained, {arm!r} on {task!r} for one: {reason}.")
        print(f"Failed {arm} on {task}: {reason}")
    print(f"Cells {counts or 'none yet'}")
    for path in write_page(comparison, options.output, options.margin):
        print(f"{path.suffix[1:].upper():<5} {path}")
    return 0


def _plan(options: Namespace, changes: Sequence[str]) -> Plan:
    from na_lora_lightning.compare.plan import ARMS, Plan, read_configs, read_named, single_task

    if not options.config:
        raise ConfigurationError("no configuration is given; give that of a fit with --config.")
    if options.other_text is not None and not Path(options.other_text).is_file():
        raise ConfigurationError(f"the text {options.other_text!r} cannot be read; correct --other-text.")
    try:
        rates = tuple(sorted({float(rate) for rate in options.rates.split(",") if rate.strip()}))
    except ValueError as error:
        raise ConfigurationError(f"--rates is {options.rates!r}; give numbers, as in 2e-4,5e-4,1e-3.") from error
    return Plan(
        base=read_configs(options.config, changes),
        tasks=read_named(options.tasks, {}, "--tasks") if options.tasks else single_task(),
        arms=read_named(options.arms, ARMS, "--arms"),
        rates=rates,
        seeds=options.seeds,
        extend=options.extend,
        prune=options.prune,
        other_text=options.other_text,
        last_layers=options.last_layers,
    )


def make_fit(config: Options) -> Fit:
    """What ``na-lora fit`` makes of a configuration, before it trains."""
    from na_lora_lightning.cli.arguments import functions_as_classes
    from na_lora_lightning.cli.training import NALoRACLI
    from na_lora_lightning.compare.cells import Fit

    class Unstarted(NALoRACLI):
        def instantiate_trainer(self, **options: Any) -> Any:
            self.save_config_callback = None
            return super().instantiate_trainer(**options)

        def _run_subcommand(self, subcommand: str) -> None:
            """Leaves it to the comparison."""

    given = ["fit", "--config", yaml.safe_dump(config, sort_keys=False) + "\n"]
    with functions_as_classes(given):
        cli = Unstarted("fit", given)
    return Fit(cli.trainer, cli.model, cli.datamodule)


def _require_fits(plan: Plan) -> None:
    """Refuses arms and tasks whose options are wrong, before anything is trained."""
    from na_lora_lightning.compare.plan import Cell

    first = next(iter(plan.tasks))
    cells = [Cell(first, arm, plan.rates[0], 0) for arm in plan.arms]
    cells += [Cell(task, plan.baseline, plan.rates[0], 0) for task in plan.tasks if task != first]
    for cell in cells:
        try:
            with _quietly():
                make_fit(plan.config(cell))
        except ConfigurationError as error:
            raise ConfigurationError(f"the arm {cell.arm!r} on {cell.task!r} cannot be trained: {error}") from error


def _in_processes(arguments: list[str], options: Namespace) -> None:
    """Runs the same command in several processes, each of which takes cells from the storage."""
    folder = Path(options.output).expanduser()
    given = [*arguments, "--workers", "0"]
    processes = []
    for number in range(options.workers):
        log = (folder / f"worker_{number}.log").open("a", encoding="utf-8")
        command = [sys.executable, "-m", "na_lora_lightning", "compare", *given]
        processes.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
    try:
        failed = [number for number, process in enumerate(processes) if process.wait() not in (0,)]
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    for number in failed:
        lines = (folder / f"worker_{number}.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        _say(f"worker {number} stopped: {lines[-1] if lines else 'it was killed'}")


def _say(line: str) -> None:
    print(line, flush=True)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps what each fit would say to itself."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    names = ("lightning.pytorch", "lightning.fabric", "na_lora_lightning")
    loggers = [logging.getLogger(name) for name in names]
    # Those of a module may have a level of their own.
    loggers += [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith(names)]
    levels = [logger.level for logger in loggers]
    disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
