"""Results: cells in a cache, packed in a file, and every command on them once."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from study_helpers import result

from benchmarks.study import StudyError
from benchmarks.study.__main__ import main
from benchmarks.study.run.storage import Results, name_of


def named(setting: str, arm: str, seed: int, test: float = 1.0) -> dict[str, Any]:
    one = result(arm, 0.01, seed, valid=1.0, test=test, setting=setting)
    one["run_info"]["experiment_name"] = f"{setting}/{arm}/rate0.01-seed{seed}"
    return one


def test_packing_moves_every_cell_and_loses_nothing(results: Results) -> None:
    written = [named(setting, arm, seed) for setting in "ts" for arm in ("mask", "lora") for seed in (1, 0)]
    for one in written:
        results.write(one)
    lines = {file.relative_to(results.cells): file.read_bytes() for file in results.cells.rglob("*.json")}
    before = results.all()
    assert before == sorted(written, key=name_of)
    assert results.pack() == {"s": 4, "t": 4}
    assert not list(results.cells.rglob("*.json"))
    assert results.all() == results.all_packed() == before
    assert results.get("t/mask/rate0.01-seed1") == named("t", "mask", 1)
    assert results.get("t/mask/rate0.01-seed2") is results.get("u/mask/rate0.01-seed1") is None
    # Each line is the cell's own file, in order of name.
    packed = gzip.decompress((results.packed / "cells.jsonl.gz").read_bytes())
    assert packed == b"".join(lines[name] for name in sorted(lines))


def test_packing_again_adds_to_what_is_there(results: Results) -> None:
    for setting in "st":
        results.write(named(setting, "lora", 1))
    results.pack()
    (file,) = results.packed.iterdir()
    once = (file.read_bytes(), file.stat().st_mtime_ns)
    assert results.pack() == {}
    assert (file.read_bytes(), file.stat().st_mtime_ns) == once
    results.write(named("s", "lora", 0))
    names = ["s/lora/rate0.01-seed0", *(f"{s}/lora/rate0.01-seed1" for s in "st")]
    assert [name_of(one) for one in results.all()] == names
    assert results.pack() == {"s": 1}
    assert [name_of(one) for one in results.all_packed()] == names


def test_packing_that_was_interrupted_goes_on(results: Results) -> None:
    for seed in (0, 1):
        results.write(named("s", "lora", seed))
    results.pack()
    (once,) = results.packed.iterdir()
    content = once.read_bytes()
    # Packed, and not yet taken out of the cache; and a file that another process has not finished.
    results.write(named("s", "lora", 1))
    results.path_of("s/lora/rate0.01-seed1").with_name(".rate0.01-seed2.json.123").write_text("{")
    assert [one["run_info"]["train_config"]["seed"] for one in results.all()] == [0, 1]
    assert results.pack() == {"s": 1}
    assert once.read_bytes() == content
    assert results.all() == results.all_packed()


def test_the_same_cells_give_the_same_bytes_whenever_they_are_packed(tmp_path: Path) -> None:
    found = []
    for order in ((0, 1, 2), (2, 0, 1)):
        results = Results(tmp_path / str(order[0]), tmp_path / "cells")
        for seed in order:
            results.write(named("s", "lora", seed))
            results.pack()
        found.append((results.packed / "cells.jsonl.gz").read_bytes())
    assert found[0] == found[1]
    assert found[0][4:8] == bytes(4)  # no time


@pytest.mark.parametrize("content", [b"", b"{", b"[]", json.dumps({"run_info": {}}).encode()])
def test_what_is_no_result_is_named(results: Results, content: bytes) -> None:
    file = results.path_of("s/lora/rate0.01-seed0")
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(StudyError, match=r"seed0\.json' is no result of a cell"):
        results.all()
    file.unlink()
    results.packed.mkdir()
    for broken in (content, gzip.compress(b"{" + content), gzip.compress(content)[:-3]):
        (results.packed / "cells.jsonl.gz").write_bytes(broken)
        if broken:
            with pytest.raises(StudyError, match=r"cells\.jsonl\.gz' holds no packed results"):
                results.all()


def test_a_study_from_the_command_line(make_study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_study(["lora", "keep_all"], seeds=[0, 1])
    study, results = str(tmp_path / "tiny.yaml"), tmp_path / "results"
    where = ["--results", str(results), "--cells", str(tmp_path / "cells")]
    assert main(["status", study, *where]) == 0
    assert "0 of 4 cells are done" in capsys.readouterr().out
    assert main(["run", study, *where, "--minutes", "5"]) == 0
    assert main(["pack", *where]) == 0
    assert [file.name for file in results.iterdir()] == ["cells.jsonl.gz"]
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
        (["status", "nowhere.yaml"], "error: 'nowhere.yaml' is not a file; give the path of a study in YAML."),
        (["reproduce", "s/lora/rate1-seed0"], "error: there is no result of a cell 's/lora/rate1-seed0'; names are "),
        (["pretrain", "llama-tanh"], "error: there is no recipe for a model 'llama-tanh'; choose one of llama-silu,"),
    ],
)
def test_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(message)
