"""``na-lora report``: one page about one run or several."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import NoReturn

from na_lora_lightning.errors import ConfigurationError

_PAGE = "report.html"


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message[:1].upper()}{message[1:]}; see na-lora report --help.")


def main(arguments: list[str]) -> int:
    """Runs ``na-lora report``.

    Args:
        arguments: What follows ``report`` on the command line.

    Returns:
        0.

    Raises:
        NALoRAError: A folder is not that of a run, or the page cannot be written.
    """
    # Not the parser of the other commands, for which torch is imported.
    parser = _Parser(
        prog="na-lora report",
        description=(
            "Write one page about a run, or about several side by side: what was trained, whether it learnt, what LoRA "
            "did to the gates of each layer, and how to run it again. It is read from the folders of the runs, also of "
            "those that are going on or were stopped; the model is not needed."
        ),
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folder of a run, such as runs/quickstart/version_0")
    parser.add_argument(
        "--output",
        type=str,
        default=None,
        metavar="FILE",
        help=f"the page (default: {_PAGE} in the folder of the run, or in this one for several)",
    )
    options = parser.parse_args(arguments)
    if not options.runs:
        raise ConfigurationError("No run is given; give the folder of at least one.")
    print(f"Report {write_report(options.runs, options.output)}")
    return 0


def write_report(runs: list[str], output: str | None = None) -> Path:
    """Writes the page.

    Args:
        runs: Folders of runs.
        output: The file; None stands for ``report.html`` in the folder of the only run, or in the current one.

    Returns:
        The file.

    Raises:
        DataError: A folder is not that of a run.
        ConfigurationError: The page cannot be written.
    """
    from na_lora_lightning.report.page import make_page
    from na_lora_lightning.report.runs import read_runs

    found = read_runs(runs)
    path = (
        (found[0].folder / _PAGE if len(found) == 1 else Path(_PAGE)) if output is None else Path(output).expanduser()
    )
    page = make_page(found)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Text of a model may hold surrogates, which no encoding has.
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigurationError(
            f"The report cannot be written to {str(path)!r} ({error.strerror}); give another file with --output."
        ) from error
    return path
