"""Declared minimums are the tested ones, and what is too old for a way in is said in one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from na_lora_lightning import versions
from na_lora_lightning.cli.main import main
from na_lora_lightning.errors import ConfigurationError

ROOT = Path(__file__).parents[1]
SENTENCE = (
    "transformers {} is installed, and the command line and its modules need 5.0 or newer; upgrade it, or use the "
    "callbacks in a project of your own, which work from 4.57."
)


def pins(file: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / file).read_text(), flags=re.MULTILINE))


def declared() -> dict[str, str]:
    project = (ROOT / "pyproject.toml").read_text()
    extras = re.search(r"^test = \[.*?\]$", project, flags=re.MULTILINE | re.DOTALL)
    assert extras
    needed = project[project.index("dependencies = [") : project.index("[project.optional-dependencies]")] + extras[0]
    return dict(re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)"', needed))


def numbers(version: str) -> tuple[int, ...]:
    found = [int(number) for number in version.split(".")]
    while found[-1:] == [0]:
        found.pop()
    return tuple(found)


def test_declared_minimums_are_those_of_the_oldest_leg() -> None:
    oldest, needed = pins("constraints-oldest.txt"), declared()
    assert {"torch", "peft", "lightning", "jsonargparse", "transformers"} <= needed.keys()
    # transformers 4.57 lies beside 5.0 in the leg's environment.
    assert needed["transformers"] in (ROOT / "Makefile").read_text()
    assert numbers(oldest["transformers"]) == (5,)
    tested = {name: oldest[name] for name in oldest.keys() & needed.keys() - {"transformers"}}
    assert {name: numbers(version) for name, version in tested.items()} == {
        name: numbers(needed[name]) for name in tested
    }


@pytest.mark.parametrize("installed", ["4.57.1", "4.58.0.dev0"])
def test_old_transformers_is_refused_by_the_command_line(
    installed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(versions, "version", lambda name: installed)
    assert main(["inspect", "--model.name_or_path", "nowhere"]) == 2
    assert capsys.readouterr().err == f"error: {SENTENCE.format(installed)}\n"


@pytest.mark.parametrize("installed", ["5.0.0", "5.23.0", "10.1"])
def test_new_transformers_is_not(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda name: installed)
    versions.require_new_transformers()


def test_the_modules_of_the_command_line_refuse_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import device

    from na_lora_lightning.models.loading import load_base_model
    from na_lora_lightning.models.source import BaseModelSource

    monkeypatch.setattr(versions, "version", lambda name: "4.57.1")
    with pytest.raises(ConfigurationError, match=re.escape(SENTENCE.format("4.57.1"))):
        load_base_model(BaseModelSource("nowhere"), device("cpu"))
