"""The README and the documentation: no link leads nowhere."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / folder / "README.md" for folder in ("benchmarks/study", "examples/vlm_digits")),
    ROOT / "benchmarks" / "study" / "hypotheses.md",
]
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "code", _FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """The names that GitHub and the site give to headings."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+\s+(.*?)\s*$", text, re.MULTILINE)
    return {slug(heading) for heading in headings}


def slug(heading: str) -> str:
    kept = "".join(c for c in heading.lower() if c in "-_ " or unicodedata.category(c)[0] in "LN")
    return kept.replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for match in _LINK.finditer(prose(page)):
        target, _, anchor = match["target"].partition("#")
        if re.match(r"\w+:", target):
            continue
        file = (page.parent / target).resolve() if target else page
        if not match["text"] or not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(match[0])
    assert dead == []


def test_the_readme_is_short_and_begins_with_what_matters() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    first_screen = "\n".join(lines[:32])
    for part in ("does *not* beat plain LoRA", "pip install", "GateImportanceCallback()", "docs/figures/gates.png"):
        assert part in first_screen


def test_every_page_of_the_documentation_is_in_its_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = {line for block in re.findall(r"```\{toctree\}(.*?)```", index, re.DOTALL) for line in block.split()}
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} <= listed


def test_the_reference_has_every_public_name() -> None:
    import na_lora_lightning

    reference = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    public = set(na_lora_lightning.__all__) - {"__version__"}
    assert {name for name in public if not re.search(rf"\b{name}\b", reference)} == set()


def test_the_map_of_the_code_names_what_there_is() -> None:
    named = re.findall(r"`((?:[a-z_]+/)*[a-z_]+(?:\.py|/))`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    package = ROOT / "na_lora_lightning"
    places = (ROOT, package, package / "core", package / "data")
    assert len(named) > 30
    # rows.py is named in full before.
    assert [name for name in named if name != "rows.py" and not any((place / name).exists() for place in places)] == []


def test_the_tests_that_documents_name_exist() -> None:
    sources = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE))
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    named = set(re.findall(r"`(test_\w+)`", pages))
    assert len(named) > 50
    assert named - defined == set()
    # Where a name is long, its start is given.
    starts = set(re.findall(r"`(test_\w+)…`", pages))
    assert {start for start in starts if not any(name.startswith(start) for name in defined)} == set()
