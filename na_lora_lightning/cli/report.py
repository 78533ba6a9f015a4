"""``na-lora report``: one page about one run or several."""

from __future__ import annotations

from na_lora_lightning.cli.errors import CommandParser
from na_lora_lightning.errors import ConfigurationError


def options_parser() -> CommandParser:
    """The parser of its options."""
    # Not the parser of the other commands, for which torch is imported.
    parser = CommandParser(
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
        help="the page (default: report.html in the folder of the run, or in this one for several)",
    )
    return parser


def main(arguments: list[str]) -> int:
    """Runs ``na-lora report``.

    Args:
        arguments: What follows ``report`` on the command line.

    Returns:
        0.

    Raises:
        NALoRAError: A folder is not that of a run, or the page cannot be written.
    """
    options = options_parser().parse_args(arguments)
    if not options.runs:
        raise ConfigurationError("no run is given; give the folder of at least one.")
    from na_lora_lightning.report.page import write_report

    print(f"Report {write_report(options.runs, options.output)}")
    return 0
