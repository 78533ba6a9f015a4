"""Makes the page: one file, without scripts, and without anything from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from na_lora_lightning.curves import HEAT_MAPS
from na_lora_lightning.errors import ConfigurationError
from na_lora_lightning.report import facts, figures
from na_lora_lightning.report.runs import Run, read_runs

_PAGE = "report.html"
# Of more runs the heat maps are left out, and of still more those of single runs.
_MOST_WITH_MAPS = 4
_LONGEST_CONFIG = 200_000


def write_report(runs: Sequence[str], output: str | None = None) -> Path:
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
            f"the report cannot be written to {str(path)!r} ({error.strerror}); give another file with --output."
        ) from error
    return path


def make_page(runs: Sequence[Run]) -> str:
    """The page as HTML.

    Args:
        runs: One, two that are compared, or more.
    """
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs"
    return render(
        "na_lora_lightning.report",
        title=title,
        date=f"{datetime.now():%Y-%m-%d %H:%M}",
        names=[run.name for run in runs],
        runs=[_described(run) for run in runs],
        options=[[name, *values] for name, values in facts.differing_options(runs)] if len(runs) > 1 else [],
        compared=[[name, *values] for name, values in facts.comparison(runs)] if len(runs) > 1 else [],
        losses=figures.losses(runs),
        profiles=_pictures(
            figures.by_layer(runs, "selection_misalignment", "selection misalignment"),
            figures.by_layer(runs, "gate_responsiveness", "responsiveness"),
        ),
        medians=_pictures(
            figures.over_steps(runs, "selection_misalignment", "selection misalignment"),
            figures.over_steps(runs, "selection_share", "selection share"),
        )
        if len(runs) > 1
        else [],
        maps=_maps(runs),
    )


def render(package: str, **content: Any) -> str:
    """A page by the ``page.html.jinja`` of a package; all text is escaped, and what has no value is an error."""
    environment = Environment(
        loader=PackageLoader(package, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(content)


def _maps(runs: Sequence[Run]) -> list[tuple[Any, list[Any]]]:
    if len(runs) > _MOST_WITH_MAPS:
        return []
    found = []
    for curve in HEAT_MAPS:
        pictures = figures.heat_maps(runs, curve)
        if len(runs) == 2 and len(pictures) == 2:
            pictures += _pictures(figures.difference(runs[0], runs[1], curve.group))
        if pictures:
            found.append((curve, pictures))
    return found


def _pictures(*pictures: Any) -> list[Any]:
    return [picture for picture in pictures if picture is not None]


def _described(run: Run) -> dict[str, Any]:
    options, parameters, pace = run.options, run.history.start.get("parameters") or {}, run.seconds_per_step
    before, after = run.before, run.after
    config = run.config
    return {
        "name": run.name,
        "folder": str(run.folder),
        "model": options.get("model"),
        "data": options.get("data.train"),
        "state": run.state,
        "resumes": run.resumes,
        "trainable": facts.number(parameters.get("trainable")),
        "total": facts.number(parameters.get("total")),
        "pace": "" if pace is None else facts.number(pace, 3),
        "settings": facts.settings(run),
        "headline": facts.headline(run),
        "in_force": run.in_force,
        "evidence": facts.evidence(run),
        "before_head": "before training" if before else "before (not measured)",
        "after_head": f"at step {after['step']:,}" if after else "after (not measured)",
        "metrics": [list(row.values()) for row in facts.metric_rows(run)],
        "hints": facts.hints(run),
        "layers": [list(row.values()) for row in facts.layer_rows(run)],
        "samples": run.samples,
        "command": run.command,
        "config": None if config is None else config[:_LONGEST_CONFIG],
        "options": [[name, facts.number(value)] for name, value in sorted(options.items())],
    }
