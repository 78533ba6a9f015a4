"""The command line: each command once, and errors in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.study.__main__ import main
from benchmarks.study.run.storage import Results, name_of


def test_a_study_from_the_command_line(make_study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_study(["lora", "keep_all"], seeds=[0, 1])
    study, results = str(tmp_path / "tiny.yaml"), tmp_path / "results"
    where = ["--results", str(results), "--cells", str(tmp_path / "cells")]
    assert main(["status", study, *where]) == 0
    assert "0 of 4 cells are done" in capsys.readouterr().out
    assert main(["run", study, *where, "--minutes", "5"]) == 0
    assert main(["pack", *where]) == 0
    assert [file.name for file in results.iterdir()] == ["tiny.digits.r2-all-linear.jsonl.gz"]
    assert main(["status", study, *where]) == 0
    assert "4 of 4 cells are done" in capsys.readouterr().out
    assert main(["report", study, *where, "--output", str(tmp_path / "out"), "--interpolate"]) == 0
    line = next(line for line in (tmp_path / "out" / "report.md").read_text().splitlines() if "| keep_all |" in line)
    assert "| +0.00 | +0.00 … +0.00 | 0/0 | 1.000 |" in line
    assert main(["reproduce", "tiny.digits.r2-all-linear/lora/rate0.01-seed1", *where]) == 0
    assert "equal, bit by bit" in capsys.readouterr().out


def test_a_changed_result_is_no_match(
    make_study: Any, results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_study(["lora"])
    where = ["--results", str(results.packed), "--cells", str(results.cells)]
    assert main(["run", str(tmp_path / "tiny.yaml"), *where]) == 0
    (result,) = results.all()
    result["train_info"]["metrics"][1]["valid loss"] = 1.0
    results.write(result)
    assert main(["reproduce", name_of(result), *where]) == 1
    assert "step 3: valid loss was 1.0 and is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "nowhere.yaml"], "Error: 'nowhere.yaml' is no file; give the path of a study in YAML."),
        (["reproduce", "s/lora/rate1-seed0"], "Error: there is no result of a cell 's/lora/rate1-seed0'; names are "),
        (["pretrain", "llama-tanh"], "Error: there is no recipe for a model 'llama-tanh'; choose one of llama-silu,"),
    ],
)
def test_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(message)
