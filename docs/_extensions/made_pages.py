"""Pages that are made: the options, from the command line's own parsers, and pages that stand outside of ``docs``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from na_lora_lightning.cli.training import NALoRACLI

_FOLDER = "_generated"
_DETAILS = re.compile(r"\s*\((?P<details>(?:required|type: ).*)\)\Z", re.DOTALL)
_SUBCLASSES = re.compile(r", known subclasses: .*", re.DOTALL)

_OWN = """# Options of the command line

Each option can stand on the command line, `--model.lora.r 8`, or in a file that `--config` names:

```yaml
model:
  lora:
    r: 8
```

`na-lora fit --config run.yaml --print_config` shows all of them with their values. `validate`, `test` and `predict`
take the same ones, but for those of callbacks. This page is made from the parser of `na-lora fit`.
"""
_TRAINER = """# Options of the trainer

The arguments of Lightning's `Trainer`, in Lightning's words, as `na-lora fit` takes them. This page is made from its
parser.
"""


class _ParserMade(Exception):  # noqa: N818
    """The parser is made; nothing is to be parsed."""


class _ParserOnly(NALoRACLI):
    def parse_arguments(self, parser: Any, args: Any) -> None:
        raise _ParserMade


def fit_parser() -> Any:
    """The parser of ``na-lora fit``."""
    command_line = _ParserOnly.__new__(_ParserOnly)
    with suppress(_ParserMade):
        command_line.__init__("fit", [])
    return command_line._subcommand_parsers["fit"]


def describe(parser: Any, groups: Iterable[Any]) -> Iterator[str]:
    """The options of groups as Markdown."""
    formatter = parser.formatter_class(prog="na-lora fit")
    names = {id(group): name for name, group in parser.groups.items()}
    for group in groups:
        actions = [action for action in group._group_actions if not _is_about_others(action)]
        if not actions:
            continue
        name = names.get(id(group))
        title = (group.title or "options").removesuffix(f" ({name})")
        yield f"## `{name}`: {_escape(title)}\n" if name else f"## {_escape(title).capitalize()}\n"
        for action in actions:
            text = formatter._expand_help(action)
            details = _DETAILS.search(text)
            text, details = (text[: details.start()], details["details"]) if details else (text, "")
            option = next((name for name in action.option_strings if name.startswith("--")), action.dest)
            yield f"`{option}`\n: {_escape(text)}"
            if details:
                yield f"\n  *{_escape(_SUBCLASSES.sub('', details))}*"
            yield "\n"


def _is_about_others(action: Any) -> bool:
    """Options that show help or read a part of the configuration from a file of its own."""
    return action.dest.endswith("help") or (action.help or "").startswith("Path to a configuration file.")


def _escape(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|$])", r"\\\1", " ".join(text.split()))


def write_pages(app: Sphinx) -> None:
    """Writes both pages, and leaves alone what is as it should be, so that builds can be incremental."""
    parser = fit_parser()
    # Puts the groups in order and takes the markup out.
    parser.format_help()
    trainer = parser.groups["trainer"]
    own = [group for group in parser._action_groups if group is not trainer and group.title != "Linked arguments"]
    folder = Path(app.srcdir) / _FOLDER
    folder.mkdir(exist_ok=True)
    for name, head, groups in (("options", _OWN, own), ("options_trainer", _TRAINER, [trainer])):
        page, text = folder / f"{name}.md", "\n".join([head, *describe(parser, groups)])
        if not page.is_file() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


# From a file of the repository to its place in the site.
_PLACES = {
    "benchmarks/study/README.md": "docs/_generated/study.md",
    "benchmarks/study/hypotheses.md": "docs/_generated/hypotheses.md",
    "examples/vlm_digits/README.md": "docs/_generated/vlm_digits.md",
    "README.md": "docs/index.md",
    "CHANGELOG.md": "docs/_generated/changelog.md",
}
_LINK = re.compile(r"\]\((?!\w+:|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def _relink(text: str, written_for: str, shown_at: str) -> str:
    """Links as they are to be at another place, with those to moved pages going there."""

    def link(match: re.Match[str]) -> str:
        target = os.path.normpath(Path(written_for).parent / match["path"])
        target = _PLACES.get(target, target)
        return f"]({os.path.relpath(target, Path(shown_at).parent)}{match['anchor'] or ''})"

    return _LINK.sub(link, text)


def bring_pages(app: Sphinx) -> None:
    """Writes the pages that come from elsewhere."""
    root = Path(app.srcdir).parent
    for source, place in _PLACES.items():
        if not place.startswith("docs/_generated/"):
            continue
        text = _relink((root / source).read_text(encoding="utf-8"), source, place)
        page = root / place
        page.parent.mkdir(exist_ok=True)
        if not page.is_file() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def relink(app: Sphinx, name: str, content: list[str]) -> None:
    """Points the links of the pages in ``docs`` to those pages."""
    if not name.startswith("_generated/"):
        content[0] = _relink(content[0], f"docs/{name}.md", f"docs/{name}.md")


def setup(app: Sphinx) -> dict[str, Any]:
    """Writes the pages before Sphinx looks for sources."""
    app.connect("builder-inited", write_pages)
    app.connect("builder-inited", bring_pages)
    app.connect("source-read", relink)
    return {"parallel_read_safe": True}
