"""Command line: ``python -m benchmarks.study COMMAND``."""

from __future__ import annotations

import argparse
import sys

from benchmarks.study import StudyError
from benchmarks.study.cells import recorded


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status, 2 for an error that the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    again = commands.add_parser("reproduce", help="run a recorded cell again and compare every number")
    again.add_argument("cell", help="its name, SETTING/ARM/rateR-seedS")
    evidence = commands.add_parser("evidence", help="write the pages of evidence from the records alone")
    evidence.add_argument("--check", action="store_true", help="change nothing; fail where it would change")
    options = parser.parse_args(arguments)
    # Each command imports what it needs: the pages start without torch's and transformers' seconds.
    try:
        if options.command == "evidence":
            from benchmarks.study.report.evidence import write_evidence

            same = write_evidence(recorded().values(), check=options.check)
            print("the pages " + ("say what the results say" if same else "were behind the results"))
            return 1 if options.check and not same else 0
        from benchmarks.study.run.reproduce import reproduce

        compared = reproduce(options.cell, recorded())
        print("\n".join(compared.lines()))
        return 1 if compared.other_results else 0
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
