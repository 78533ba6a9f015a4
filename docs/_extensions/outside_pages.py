"""Brings pages of the repository that stand outside of ``docs`` into the site, and points links to them there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

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


def write_pages(app: Sphinx) -> None:
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
    app.connect("source-read", relink)
    return {"parallel_read_safe": True}
