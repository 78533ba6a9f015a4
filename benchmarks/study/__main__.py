"""Command line: ``python -m benchmarks.study COMMAND``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.study import StudyError
from benchmarks.study.run.storage import CELLS, PACKED, Results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    pretrain = commands.add_parser("pretrain", help="pretrain the small models, once")
    pretrain.add_argument("models", nargs="*", metavar="MODEL", help="which (default: all)")
    run = commands.add_parser("run", help="run what is left of a study")
    run.add_argument("study", type=Path)
    run.add_argument("--minutes", type=float, help="start no cell that would end after this many minutes")
    run.add_argument("--extend", type=int, default=0, metavar="N", help="grow grids whose best rate is at an edge")
    status = commands.add_parser("status", help="how much of a study is done")
    status.add_argument("study", type=Path)
    report = commands.add_parser("report", help="tables and figures of a study, from results alone")
    report.add_argument("study", type=Path)
    report.add_argument("--at", choices=("last", "best"), default="last", help="last step, or the best by validation")
    report.add_argument("--baseline", help="arm to compare with (default: the study's)")
    report.add_argument("--interpolate", action="store_true", help="compare at the bottom of a parabola over rates")
    report.add_argument("--output", type=Path, help="folder for report.md and figures")
    report.add_argument("--figures", action="store_true")
    again = commands.add_parser("reproduce", help="run a result's cell again and compare every number")
    again.add_argument("cell", help="its name, SETTING/ARM/rateR-seedS")
    pack = commands.add_parser("pack", help="move cells that ran into the packed file of their setting")
    evidence = commands.add_parser("evidence", help="write the pages of evidence from packed results alone")
    evidence.add_argument("--check", action="store_true", help="change nothing; fail where it would change")
    for command in (run, status, report, again, pack, evidence):
        command.add_argument("--results", type=Path, default=PACKED, help="folder of packed results (%(default)s)")
    for command in (run, status, report, again, pack):
        command.add_argument("--cells", type=Path, default=CELLS, help="folder that cells run into (%(default)s)")
    return parser


def _run(options: argparse.Namespace) -> int:
    # Each command imports what it needs: reports start without torch's and transformers' seconds.
    if options.command == "pretrain":
        from benchmarks.study.base_models.catalogue import pretrain_missing

        pretrain_missing(options.models)
        return 0
    if options.command == "evidence":
        from benchmarks.study.report.evidence import write_evidence

        same = write_evidence(Results(options.results).all_packed(), check=options.check)
        print("the pages " + ("say what the results say" if same else "were behind the results"))
        return 1 if options.check and not same else 0
    results = Results(options.results, options.cells)
    if options.command == "pack":
        for setting, count in results.pack().items():
            print(f"{setting}: {count} cells")
        return 0
    if options.command == "reproduce":
        from benchmarks.study.run.reproduce import reproduce

        again = reproduce(options.cell, results)
        print("\n".join(again.lines()))
        return 1 if again.other_results else 0
    from benchmarks.study.run.specification import load_study, results_of

    study = load_study(options.study)
    if options.command == "run":
        from benchmarks.study.run.runner import run_study

        failed = run_study(study, results, options.minutes, options.extend, log=lambda line: print(line, flush=True))
        return 1 if failed else 0
    if options.command == "status":
        from benchmarks.study.run.runner import remaining

        cells = list(study.cells())
        print(f"{len(cells) - len(remaining(cells, results))} of {len(cells)} cells are done")
        return 0
    from benchmarks.study.report.summary import make_report

    found = results_of(study, results.all())
    baseline = options.baseline or study.baseline
    make_report(found, baseline, options.at, options.output, study.name, options.figures, options.interpolate)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status, 2 for an error that the user can fix."""
    try:
        return _run(_parser().parse_args(arguments))
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted: cells that ended are kept; run it again to go on.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
