"""Commands whose output nobody reads any more end as they would have, without a traceback."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TextIO

import pytest
from module_helpers import saved_model

from na_lora_lightning.cli.main import main
from na_lora_lightning.cli.output import unread_output_is_dropped


def pipe_without_reader() -> TextIO:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("options", [[], ["--json"], ["--lora.target_modules", "[q_porj]"], ["--help"], ["--nope"]])
def test_inspect_into_a_closed_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: str, options: list[str]
) -> None:
    base = saved_model(tmp_path)
    with pipe_without_reader() as closed:
        monkeypatch.setattr(sys, stream, closed)
        failed = "[q_porj]" in options or "--nope" in options
        assert main(["inspect", base, *options]) == (2 if failed else 0)
        assert getattr(sys, stream) is closed
        monkeypatch.undo()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["nothing"]])
def test_help_into_closed_pipes(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    with pipe_without_reader() as out, pipe_without_reader() as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        assert main(arguments) == (2 if arguments in ([], ["nothing"]) else 0)
        monkeypatch.undo()


def test_work_goes_on_when_the_reader_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    done = []
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with unread_output_is_dropped():
            print("first", flush=True)
            assert os.read(reader, 100) == b"first\n"
            os.close(reader)
            for line in range(3):
                print("x" * 100_000, flush=True)
                done.append(line)
        monkeypatch.undo()
    assert done == [0, 1, 2]


def test_a_process_without_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["--version"]) == 0
    monkeypatch.undo()
