"""The command line: each command once, and errors in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from study_fixtures import base_models_folder, pools_folder, study_maker  # noqa: F401

from benchmarks.study.__main__ import main


def test_a_study_from_the_command_line(make_study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_study(["lora", "keep_all"], seeds=[0, 1])
    study, results = str(tmp_path / "tiny.yaml"), tmp_path / "results"
    where = ["--results", str(results)]
    assert main(["status", study, *where]) == 0
    assert "0 of 4 cells are done" in capsys.readouterr().out
    assert main(["run", study, *where, "--minutes", "5"]) == 0
    assert main(["status", study, *where]) == 0
    assert "4 of 4 cells are done" in capsys.readouterr().out
    assert main(["report", study, *where, "--output", str(tmp_path / "out"), "--interpolate"]) == 0
    line = next(line for line in (tmp_path / "out" / "report.md").read_text().splitlines() if "| keep_all |" in line)
    assert "| +0.00 | +0.00 … +0.00 | 0/0 | 1.000 |" in line
    assert main(["reproduce", str(next(results.rglob("*.json")))]) == 0
    assert "equal, bit by bit" in capsys.readouterr().out


def test_a_changed_result_is_no_match(make_study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_study(["lora"])
    assert main(["run", str(tmp_path / "tiny.yaml"), "--results", str(tmp_path / "results")]) == 0
    file = next((tmp_path / "results").rglob("*.json"))
    result = json.loads(file.read_text())
    result["train_info"]["metrics"][1]["valid loss"] = 1.0
    file.write_text(json.dumps(result))
    assert main(["reproduce", str(file)]) == 1
    assert "step 3: valid loss was 1.0 and is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "nowhere.yaml"], "Error: 'nowhere.yaml' is no file; give the path of a study in YAML."),
        (["reproduce", "nowhere.json"], "Error: 'nowhere.json' is no result of a cell"),
        (["pretrain", "llama-tanh"], "Error: there is no recipe for a model 'llama-tanh'; choose one of llama-silu,"),
    ],
)
def test_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(message)
