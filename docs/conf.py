"""The documentation's site: ``make docs``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

from na_lora_lightning import __version__

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "NA-LoRA for PyTorch Lightning"
author = "the authors of na-lora-lightning"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "made_pages"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "NA-LoRA"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
# Code stands in many sentences.
smartquotes = False

# Links to headings, and names of options as definitions.
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
# Diagrams of code with … in it.
suppress_warnings = ["misc.highlighting_failure"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def _escape_bars(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Magnitudes such as |ρ'| are substitutions in reStructuredText."""
    lines[:] = [line.replace("|", r"\|") for line in lines]


def _shorten_defaults(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Groups of options are named without their values, and functions without their addresses."""
    if signature:
        signature = re.sub(r"\b(\w+(?:Options|Variant))\([^()]*\)", r"\1()", signature)
        signature = re.sub(r"<function .*?<lambda>>", "...", signature)
    return signature, returns


def setup(app: Sphinx) -> None:
    """Registers what docstrings and signatures need."""
    app.connect("autodoc-process-signature", _shorten_defaults)
    # After napoleon, which reads them as they are.
    app.connect("autodoc-process-docstring", _escape_bars, priority=900)
