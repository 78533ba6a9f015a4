"""The notebook in ``examples`` runs, and shows what its text says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "gates.ipynb"


@pytest.fixture
def cells() -> list[str]:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_runs(
    cells: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import matplotlib
    from matplotlib import pyplot

    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    monkeypatch.setattr(pyplot, "show", pyplot.close)
    names: dict[str, object] = {"__name__": "notebook"}
    for cell in cells:
        exec(compile(cell, str(NOTEBOOK), "exec"), names)
    printed = capsys.readouterr().out
    assert "names the larger digit: 100%" in printed
    assert len(re.findall(r"^layer_0\d silu 256 channels, rows slice\(0, 256, 1\)", printed, re.MULTILINE)) == 4
    assert "bitwise plain LoRA: True" in printed
    assert re.findall(r"(\d+)% of rows never moved", printed) == ["50"] * 4
    assert list(tmp_path.iterdir()) == []
