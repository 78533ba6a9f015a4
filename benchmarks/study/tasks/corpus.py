"""Real text found in installed packages, by a recipe that the packages' versions determine.

The base models were pretrained on documentation of numpy, pandas, scipy, scikit-learn and torch. The tasks take their
text from other packages, so that what a task asks for was not seen in pretraining.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from benchmarks.study import StudyError

_DISTRIBUTIONS = {"sklearn": "scikit-learn"}
_SHORTEST = 80


def package_folder(package: str) -> Path:
    """Folder of an installed package.

    Raises:
        StudyError: It is not installed.
    """
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise StudyError(f"the package {package!r} holds text of the study and is not installed; install it with pip.")
    return Path(next(iter(found.submodule_search_locations)))


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Installed version of each package, by import name."""
    return {package: version(_DISTRIBUTIONS.get(package, package)) for package in packages}


def digest(texts: Iterable[str]) -> str:
    """SHA-256 of texts in order."""
    total = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        total.update(len(encoded).to_bytes(8, "little"))
        total.update(encoded)
    return total.hexdigest()


def syntax_trees(package: str) -> Iterator[tuple[str, ast.Module]]:
    """Source and syntax tree of each module of a package, in order of path; test modules are left out."""
    root = package_folder(package)
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        inside = path.relative_to(root).as_posix()
        if "test" in inside:
            continue
        try:
            source = path.read_text(encoding="utf-8")
            yield source, ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # templates and deliberately broken files


@cache
def docstrings(package: str) -> tuple[str, ...]:
    """Docstrings of at least 80 characters, each once, in order of path and position."""
    found: dict[str, None] = {}
    for _, tree in syntax_trees(package):
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text is not None and len(text) >= _SHORTEST:
                    found[text] = None
    return tuple(found)


@cache
def functions(package: str, shortest: int = 200, longest: int = 1200) -> tuple[str, ...]:
    """Source of functions without their docstrings, each once, in order of path and position."""
    found: dict[str, None] = {}
    for source, tree in syntax_trees(package):
        lines = source.splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.end_lineno is None:
                continue
            kept = lines[node.lineno - 1 : node.end_lineno]
            if ast.get_docstring(node) is not None:
                documentation = node.body[0]
                assert documentation.end_lineno is not None
                kept = (
                    lines[node.lineno - 1 : documentation.lineno - 1]
                    + lines[documentation.end_lineno : node.end_lineno]
                )
            text = "\n".join(line[node.col_offset :] for line in kept)
            if shortest <= len(text) <= longest:
                found[text] = None
    return tuple(found)


@cache
def named_functions(package: str) -> tuple[tuple[str, str], ...]:
    """First paragraph of the docstring and name of public functions, each name and each paragraph once."""
    found: dict[str, str] = {}
    names: set[str] = set()
    for _, tree in syntax_trees(package):
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or node.name in names:
                continue
            paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if len(paragraph) >= 30 and len(node.name) >= 5 and paragraph not in found:
                found[paragraph] = node.name
                names.add(node.name)
    return tuple(found.items())


@cache
def raised_messages(package: str) -> tuple[tuple[str, str], ...]:
    """Messages (at least 25 characters) that a package raises, ``_`` for what is filled in, and their exceptions."""
    found: dict[str, str] = {}
    for _, tree in syntax_trees(package):
        for node in ast.walk(tree):
            if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call) or not node.exc.args:
                continue
            first, function = node.exc.args[0], node.exc.func
            parts = first.values if isinstance(first, ast.JoinedStr) else [first]
            if not isinstance(function, ast.Name) or not isinstance(first, ast.JoinedStr | ast.Constant):
                continue
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "_" for part in parts)
            message = " ".join(text.split())
            if len(message) >= 25:  # Shorter ones hardly say what went wrong.
                found.setdefault(message, function.id)
    return tuple(found.items())


@cache
def header_pieces(package: str, folder: str, length: int = 400) -> tuple[str, ...]:
    """C and C++ headers of a package, cut at blank lines into pieces of about ``length`` characters."""
    root = package_folder(package) / folder
    pieces: dict[str, None] = {}
    for path in sorted(root.rglob("*.h"), key=lambda path: path.relative_to(root).as_posix()):
        piece = ""
        for paragraph in path.read_text(encoding="utf-8", errors="replace").split("\n\n"):
            piece = f"{piece}\n\n{paragraph}" if piece else paragraph
            if len(piece) >= length:
                pieces[piece[: 2 * length]] = None
                piece = ""
    return tuple(pieces)
