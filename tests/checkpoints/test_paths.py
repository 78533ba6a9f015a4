from __future__ import annotations

import os
from pathlib import Path

import pytest

from na_lora_lightning.checkpoints.paths import is_within, same_path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``base`` with a file, a link ``link`` to it, and the working directory beside both."""
    (tmp_path / "base" / "deep").mkdir(parents=True)
    (tmp_path / "base" / "file").write_text("")
    (tmp_path / "link").symlink_to("base")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "spelling",
    ["base", "./base", "base/", "base/deep/..", "link", "link/deep/../", "~/base", "{root}/base", "{root}/link"],
)
def test_spellings_of_a_folder(folder: Path, spelling: str) -> None:
    path = spelling.format(root=folder)
    assert same_path(path, "base")
    assert same_path("base", path)
    assert is_within(path, "base")
    assert is_within("base/deep", path)
    assert is_within("base/to/come", path)
    assert not is_within(path, "base/deep")


def test_what_does_not_exist_yet(folder: Path) -> None:
    (folder / "ahead").symlink_to("base/to/come")
    assert same_path("ahead", "link/to/come")
    assert same_path("new/x/..", "new")
    assert is_within("link/to/come/file", "ahead")
    assert not same_path("new", "newer")
    assert not is_within("newer", "new")
    assert not is_within("bases", "base")


def test_other_names_of_a_file(folder: Path) -> None:
    os.link("base/file", "twin")
    assert same_path("twin", "base/file")
    assert not same_path("loop", "base")
    assert same_path("loop", "./loop")


def test_a_parent_holds_everything_below(folder: Path) -> None:
    assert is_within("base/deep", ".")
    assert is_within("link", folder)
    assert is_within(folder, "/")
    assert not is_within(folder, "base")
